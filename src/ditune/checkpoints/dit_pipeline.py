"""A DiT that DiTune has exported, in diffusers: class-conditional images by DDIM or another scheduler.

This file needs torch and diffusers only, and lies in the folder of every export:

    from diffusers import DiffusionPipeline
    code = {"custom_pipeline": f"{folder}/pipeline.py", "trust_remote_code": True}
    pipeline = DiffusionPipeline.from_pretrained(folder, **code)
    images = pipeline(class_labels=[0, 1], guidance_scale=1.5, num_inference_steps=50).images

It corrects three things of diffusers' own DiT: the timestep's frequencies (10000^(-k/128), not k/127) and an epsilon
(1e-6), with which the network computes what it was trained to; and the null class, which is the network's, not 1000.
"""

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.models.embeddings import get_2d_sincos_pos_embed


def correct(transformer, pos_embed_scale=1.0):
    """Make a DiTTransformer2DModel compute what DiT computes with the same weights; returns it."""
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    embedder = transformer.pos_embed
    if pos_embed_scale != 1:
        grid = transformer.config.sample_size // transformer.config.patch_size
        width = transformer.inner_dim
        table = get_2d_sincos_pos_embed(
            width, grid, base_size=grid, interpolation_scale=1 / pos_embed_scale, output_type="pt"
        )
        embedder.pos_embed = table[None].to(embedder.pos_embed)
    return transformer


class DiTunePipeline(DiffusionPipeline):
    """Images of classes 0 .. K-1.

    Args:
        transformer: DiTTransformer2DModel.
        scheduler: of the diffusion.
        vae: decodes latents; None = the latents themselves are returned.
        id2label: names of the classes.
        pos_embed_scale: of the network.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012

    def __init__(self, transformer, scheduler, vae=None, id2label=None, pos_embed_scale=1.0):
        super().__init__()
        correct(transformer, pos_embed_scale)
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(id2label=id2label, pos_embed_scale=pos_embed_scale)

    @torch.no_grad()
    def __call__(self, class_labels, guidance_scale=1.5, generator=None, num_inference_steps=50, output_type="pil"):
        """Generate images.

        Args:
            class_labels: list of N class numbers.
            guidance_scale: 1 = without guidance.
            generator: of the initial noise.
            num_inference_steps: steps of the scheduler.
            output_type: pil, np, pt or latent.
        """
        config, device, n = self.transformer.config, self._execution_device, len(class_labels)
        shape = (n, config.in_channels, config.sample_size, config.sample_size)
        x = torch.randn(shape, generator=generator, dtype=self.transformer.dtype).to(device)
        labels = torch.tensor(class_labels, device=device)
        guided = guidance_scale != 1
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, config.num_embeds_ada_norm)])  # the null class
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.progress_bar(self.scheduler.timesteps):
            inputs = torch.cat([x, x]) if guided else x
            time = torch.full((len(inputs),), int(t), device=device)
            out = self.transformer(inputs, timestep=time, class_labels=labels).sample[:, : config.in_channels]
            if guided:
                with_class, without = out.chunk(2)
                out = without + guidance_scale * (with_class - without)
            x = self.scheduler.step(out, t, x).prev_sample
        if self.vae is None or output_type == "latent":
            return ImagePipelineOutput(images=x)
        images = self.vae.decode(x / self.vae.config.scaling_factor).sample
        images = (images / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).cpu().float().numpy()
        return ImagePipelineOutput(images=self.numpy_to_pil(images) if output_type == "pil" else images)
