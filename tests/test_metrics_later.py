"""torchmetrics is imported later, in whatever version; tests/config/test_keys.py uses the real one."""

import sys

from ditune import metrics_later


def test_a_version_with_other_files_is_imported_at_once(tmp_path, monkeypatch):
    package = tmp_path / "newer_metrics"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '9.0'\nfrom newer_metrics.own import Metric\n")
    (package / "own.py").write_text("class Metric: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(metrics_later, "PACKAGE", "newer_metrics")
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, metrics_later._Finder)])
    metrics_later.import_metrics_later()
    try:
        import newer_metrics

        assert "Metric" in vars(newer_metrics)
        assert newer_metrics.__version__ == "9.0"
    finally:
        for name in ("newer_metrics", "newer_metrics.own"):
            sys.modules.pop(name, None)
