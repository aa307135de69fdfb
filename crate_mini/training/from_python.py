"""`crate_mini.train`: a training run from Python or a notebook, by the same script."""

import contextlib
import importlib.util
import io
import sys
from pathlib import Path

from crate_mini import UserError
from crate_mini.console import results
from crate_mini.training.settings import flags


def train(quiet=False, **settings):
    """Train as `python train.py` does; returns the folder of the best checkpoint.

    settings: those of train.py and of model.Config by name, such as train_steps=100 (or steps),
    data="mytext.txt", n_layer=1, and `resume`, a folder. quiet: no progress lines. Signals and
    random generators are as before when it returns. Raises UserError for settings that cannot be
    run, and KeyboardInterrupt if it was stopped, after saving what a resume needs.
    """
    script = _script()
    words = flags({name: value for name, value in settings.items() if value is not None})
    shown = io.StringIO() if quiet else sys.stdout
    with contextlib.redirect_stdout(shown):
        code = script.main(words)
    folder = Path(settings.get("resume") or settings.get("out") or _default_folder(script, words))
    if code:
        raise KeyboardInterrupt(f"stopped and saved; crate_mini.train(resume={str(folder)!r})")
    best = folder / "best"
    return best if best.exists() else folder / "last"


def _script():
    """The module of train.py, which lies next to the package."""
    path = results.ROOT / "train.py"
    loaded = sys.modules.get("train")
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    if not path.exists():
        raise UserError(
            f"crate_mini.train needs the script {path}; use a clone of the project, installed with "
            "`pip install -e .`."
        )
    spec = importlib.util.spec_from_file_location("crate_mini_train_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _default_folder(script, words):
    """The folder of a run that names none."""
    settings, _, _ = script.parse(words)
    return settings.out
