"""`interpret.py report`, also the last stage of `neurons`: pages and figures; no model runs."""

from dataclasses import dataclass
from pathlib import Path

from crate_mini import UserError
from crate_mini.cli import setting
from crate_mini.console import results, terminal
from crate_mini.console.results import atomic_write
from crate_mini.neurons import figures, neuronpedia, page, score_files, survey
from crate_mini.training import checkpoint


@dataclass
class Settings:
    """Pages and figures of the neurons that `neurons` has scored.

    index.html shows the neurons, human.html asks people about them; both open from disk.
    """

    seed: int = setting(0, "seed of all draws: questions, and neurons if there are too many")
    most: int = setting(
        2048, "neurons in index.html; if there are more, this many are drawn", low=1
    )
    humans: int = setting(30, "neurons that human.html asks about; 0: do not write it")
    neuronpedia: str | None = setting(
        None, "also write the neurons to this .jsonl file, in Neuronpedia's JSON shape"
    )
    answers: str | None = setting(None, "only score this file of answers, saved by human.html")
    tokenizer: str | None = checkpoint.tokenizer_setting()
    out: str | None = checkpoint.results_folder_setting()


def run(settings, ckpt):
    """Write the pages and figures, or count the answers in a file.

    Raises UserError as `score_files.read`, `write_report` and `survey.score` do.
    """
    if settings.answers:
        answers = terminal.plain_file(settings.answers, "--answers")
        print(survey.table(survey.score(answers)))
        return
    _, meta = checkpoint.load(ckpt)
    token_bytes = checkpoint.open_tokenizer(ckpt, meta, settings.tokenizer).token_bytes
    folder = results.folder(ckpt, settings.out)
    scored = score_files.read(folder)
    record = scored.record
    if record["checkpoint"]["sha256"] != meta["sha256"]:
        raise UserError(
            f"the scores in {folder} are of another checkpoint than {ckpt}; name theirs, "
            f"{record['checkpoint']['path']}, or score this one with `python interpret.py neurons "
            f"{ckpt}`."
        )
    if settings.neuronpedia:
        results.ready_file(settings.neuronpedia)
    files = write_report(folder, scored, token_bytes, settings.seed, settings.most, settings.humans)
    if settings.humans and folder / "human.html" not in files:
        print("note      no human.html: too few neurons have a label and four held-out excerpts")
    if settings.neuronpedia:
        name = Path(ckpt).resolve().parent.name
        content = neuronpedia.export(scored, token_bytes, name)
        files.append(_write(Path(settings.neuronpedia), content))
    for path in files:
        print(f"file      {path}, {path.stat().st_size / 1e3:,.0f} kB")


def report_neurons(work):
    """The stage `report`: pages and figures of the result files in the folder of a Workspace."""
    scored = score_files.read(work.folder)
    work.check_scores(scored.neurons, scored.summary)
    write_report(work.folder, scored, work.tokenizer.token_bytes, work.seed)


def write_report(folder, scored, token_bytes, seed=0, most=2048, humans=30):
    """Write index.html, human.html, scores.png and density.png; returns their paths.

    scored: what score_files.read made of the folder; token_bytes: from an id to its bytes; most,
    humans: neurons in either page. There is no human.html if no neuron can be asked about. Raises
    UserError as `page.index` does.
    """
    # Both pages are complete before either is written.
    index = page.index(folder, scored, token_bytes, seed, most)
    questions = survey.page(scored, token_bytes, seed, humans)
    files = [_write(folder / "index.html", index)]
    if questions:
        files.append(_write(folder / "human.html", questions))
    name = score_files.checkpoint_name(scored.record)
    files.append(figures.scores_by_layer({name: scored.summary}, folder / "scores.png"))
    files.append(figures.score_against_density({name: scored.neurons}, folder / "density.png"))
    return files


def _write(path, content):
    """Write bytes to a file, atomically; returns its path."""
    with atomic_write(path) as file:
        file.write(content)
    return path


COMMAND = terminal.Command(Settings, run)
