"""The metrics of torchmetrics are imported when one of them is used: Lightning needs two of its base classes.

`import torchmetrics` imports all its metrics, and with them transformers, torchvision, SciPy and matplotlib, which
takes longer than all other imports of a training. Nothing of it is replaced or hidden: the files are executed later.
"""

import logging
import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

PACKAGE, PLOT = "torchmetrics", "torchmetrics.utilities.plot"


def import_metrics_later() -> None:
    """From now on `import torchmetrics` takes little time. It changes nothing where that has been imported already."""
    if PACKAGE not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in (PACKAGE, PLOT):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Later(spec.loader)
        return spec


class _Later(Loader):
    """Executes the file of a module when something is asked for that Lightning does not need.

    Args:
        loader: of that file.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        def execute(name: str) -> Any:
            if name == "__path__":  # by which the import system asks whether it is a package
                raise AttributeError(name)
            del module.__getattr__
            try:
                self.loader.exec_module(module)
            except BaseException:
                module.__getattr__ = execute
                raise
            return getattr(module, name)

        module.__getattr__ = execute
        if module.__name__ == PACKAGE:
            try:
                _begin_package(module)
            except ImportError:  # a version whose files have other names: all of it, now
                execute("__version__")
        else:
            _begin_plot(module, execute)


def _begin_package(package: ModuleType) -> None:
    """What its __init__ would give to Lightning and to its own base classes."""
    package._logger = logging.getLogger(PACKAGE)
    package.__version__ = import_module(f"{PACKAGE}.__about__").__version__
    import_module(f"{PACKAGE}.utilities")  # before the classes, which import it in a circle
    package.Metric = import_module(f"{PACKAGE}.metric").Metric
    package.MetricCollection = import_module(f"{PACKAGE}.collections").MetricCollection


def _begin_plot(plot: ModuleType, execute: Any) -> None:
    """What the base classes import of it: types for annotations, and the function that plots."""

    def plot_single_or_multi_val(*args: Any, **kwargs: Any) -> Any:
        if "__getattr__" in vars(plot):
            execute("plot_single_or_multi_val")
        return plot.plot_single_or_multi_val(*args, **kwargs)

    plot._AX_TYPE, plot._PLOT_OUT_TYPE = Any, Any
    plot.plot_single_or_multi_val = plot_single_or_multi_val
