"""Names of before still work: configs, stored runs and other code use them."""

from ditune import objectives, rng, run, run_experts, samplers
from ditune.networks import build_network, dit, dit_moe, sizes
from ditune.objectives import ConsistencyDistillation
from ditune.processes import FlowProcess


def test_functions_are_where_they_were():
    assert run.load_experts is run_experts.load_experts


def test_classes_have_aliases():
    assert rng.Draws is objectives.Draws is rng.StepRandom
    assert (samplers.Jumps, samplers.Renoise) == (samplers.ShortcutSampler, samplers.ConsistencySampler)
    assert (samplers.Jumps.kind, samplers.Renoise.kind) == ("Jumps", "Renoise")
    assert dit.DiTBlock is dit.TransformerBlock
    assert (dit.SIZES, dit_moe.SIZES, dit_moe.MOE_NETWORKS) == (sizes.DIT, sizes.DIT_MOE, sizes.MOE_NETWORKS)


def test_a_new_step_embedding_is_named_by_both():
    network = build_network("tiny", input_size=8, step=True)
    assert network.fresh == network.new_parameter_prefixes == ()
    network.ignore_step_at_first()
    assert network.fresh == network.new_parameter_prefixes == ("step_embedder.",)
    assert not network.step_embedder.mlp[2].weight.any()
    network.fresh = ()
    assert network.new_parameter_prefixes == ()


def test_the_teacher_is_updated_by_both():
    objective = ConsistencyDistillation(FlowProcess(step="log2", base_steps=8))
    for step in (0, 1):
        assert objective.renews_teacher(step, 10) == objective.updates_teacher(step, 10) == (step == 0)
