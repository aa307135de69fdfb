"""`--help` without the seconds that PyTorch takes to load.

Help needs the declarations of settings and nothing that computes. So when a script is only asked
for help, the packages that compute are replaced by stand-ins before anything imports them; Sphinx
does the same to document a package without what it runs on (autodoc_mock_imports).
"""

import itertools
import sys
from importlib.machinery import ModuleSpec

PACKAGES = {"torch", "numpy", "matplotlib"}


class StandIn:
    """A module, class, function or value of such a package, good for all that an import does.

    It can be called, indexed, combined by |, used as a decorator and be the base of a class.
    """

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn()

    def __call__(self, *args, **kwargs):
        return StandIn()

    __getitem__ = __or__ = __ror__ = __call__

    def __mro_entries__(self, bases):
        return ()


class Finder:
    """Finds stand-ins for PACKAGES and all their modules; a finder and loader of importlib."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in PACKAGES:
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return StandIn()

    def exec_module(self, module):
        pass


def asks_for_help(words):
    """Whether argparse answers this command line with its help, or with an error."""
    flags = itertools.takewhile(lambda word: word != "--", words)
    return not {"-h", "--help"}.isdisjoint(flags)


def install():
    """Let all imports from now on find the stand-ins; the process must end with its help."""
    if PACKAGES.isdisjoint(sys.modules):
        sys.meta_path.insert(0, Finder())
