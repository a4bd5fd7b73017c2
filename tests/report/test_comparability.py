"""Methods with unequal chances or protocols are named."""

from pathlib import Path

from ditune.report.comparability import warnings
from ditune.report.results import Run


def run(method: str, lr: float = 1e-3, data: str = "cub", **protocol: object) -> Run:
    common = {"n": 10, "guidance": 1.5, "features": {"resize": "clean"}, "reference": "a"}
    metrics = {"protocol": common | protocol, "after": {"fid_clean_10": 1.0}}
    return Run(Path(), {"method": method, "lr": lr, "data": {"name": data}, "metrics": metrics, "status": "finished"})


def test_equal_chances_need_no_warning():
    runs = [run(method, lr) for method in ("full", "lora") for lr in (1e-4, 1e-3)]
    assert warnings([*runs, run("full", data="food101", reference="b")], "fid_clean_10") == []
    assert warnings([run("full", guide="null_class"), run("lora")], "fid_clean_10") == [], "a neutral value is left out"


def test_unequal_numbers_of_learning_rates():
    runs = [run("full", 1e-4), run("full", 1e-3), run("lora"), run("lora", data="food101")]
    (found,) = warnings(runs, "fid_clean_10")
    assert found == "Unequal search on cub: the methods had different numbers of learning rates (lora 1, full 2)."


def test_unequal_protocols():
    others = {"guide": "base {}", "features": {"resize": "bilinear"}, "reference": "b", "guidance_channels": 3}
    for key, value in others.items():
        (found,) = warnings([run("full"), run("lora", **{key: value})], "fid_clean_10")
        assert found.startswith("Unequal protocol on cub: the runs differ in "), key
        assert found.endswith("(full; lora).")
    assert warnings([run("full"), run("lora", guide="base {}")], "kid_efflite0") == [], "of another metric"
