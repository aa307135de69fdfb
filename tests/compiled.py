"""Loading the compiled module: this checkout's, or another build's."""

from importlib import util


def load_extension(path=None):
    """The compiled module of this checkout or of a file; None if it cannot be imported."""
    try:
        if path is None:
            from crate_mini import _C

            return _C
        spec = util.spec_from_file_location("another_build._C", path)
        module = util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except ImportError:
        return None
