"""`interpret.py concepts CKPT`: concepts of a classifier, and whether it relies on them."""

from dataclasses import dataclass

from crate_mini.cli import setting
from crate_mini.concepts import pipeline, report, salience, survey
from crate_mini.console import terminal
from crate_mini.training import checkpoint


@dataclass
class Settings:
    """Discrete concepts between two layers of a classifier (made by train.py --task classify).

    Codes of word states are discovered by several methods. Then the concept of the word that most
    decided a prediction is removed from the classifier's states: does accuracy fall, and by more
    than with any control?
    """

    from_: str | None = setting(
        None, "stage to run again, with all after it", choices=tuple(pipeline.STAGES)
    )
    layers: str = setting(
        "",
        "lower and upper layer, like 1,3; 0 is the embeddings",
        shown="the last, and the one below it by two or by a third of all, whichever is more",
    )
    k: int = setting(0, "codes of each method; 0: one per 200 training words, between 8 and 400")
    methods: str = setting(
        "all",
        "clvq, vq, kmeans, ward (needs scikit-learn), sae, separated by commas; all: those that "
        "can run here",
    )
    seeds: str = setting(
        "0", "seeds of discovery, partners and folds, like 0,1,2; pages show the first"
    )
    least: int = setting(5, "occurrences that a word needs in the training texts", low=1)
    most: int = setting(20, "maximum occurrences of a word to use, in either split", low=1)
    tests: int = setting(500, "number of test texts to use, the first ones; 0: all")
    whole: int = setting(
        200,
        "test texts for the form `all`, which removes the concept at every position and costs "
        "most; 0: none",
    )
    nodes: int = setting(
        salience.NODES, "points on the path of integrated gradients, at first", low=1
    )
    gap: float = setting(
        salience.TOLERANCE,
        "how far attributions of a text may fail to add up to the difference of its logit, as a "
        "share of it; its points are doubled until they do",
        above=0,
    )
    max_nodes: int = setting(salience.MOST_NODES, "points beyond which none are added", low=1)
    active: int = setting(
        1,
        "features of sae active for each word; 1: a word has one code, as in other methods",
        low=1,
    )
    epochs: int = setting(50, "maximum epochs of clvq and vq", low=1)
    memory: str = setting(
        "q",
        "what the decoder of clvq attends to, besides its own words; q: codes; z: states, as in "
        "the paper",
        choices=("q", "z"),
    )
    mask: str = setting(
        "causal",
        "words that this decoder sees; causal: earlier ones; none: all, as in the paper",
        choices=("causal", "none"),
    )
    revive: bool = setting(False, "restart codes of clvq and vq that no word chose during an epoch")
    controls: bool = setting(True, "train control decoders too, without codes and with wrong ones")
    shown: int = setting(20, "codes of each method on the page, drawn by the first seed", low=1)
    judges: str = setting(
        "", "language models that rate concepts: hf:NAME, http:MODEL, separated by commas"
    )
    items: int = setting(50, "test texts that they rate", low=1)
    url: str = setting(
        "http://127.0.0.1:8080/v1", "base URL of an OpenAI-compatible server, for http:MODEL"
    )
    key_env: str = setting("OPENAI_API_KEY", "environment variable that holds the server's key")
    budget: int = setting(0, "tokens that the judges may spend; 0: no limit")
    replay: str = setting("", "file to take all judges' answers from; no model is needed")
    record: str = setting("", "file to write the judges' answers to")
    answers: str = setting(
        "", "only count people's answers to the packet, in these files, separated by commas"
    )
    tokenizer: str | None = checkpoint.tokenizer_setting()
    device: str = checkpoint.device_setting()
    out: str | None = setting(
        None, "folder of the results", shown="`concepts` next to the checkpoint"
    )


def run(settings, ckpt):
    """Run the stages on a classifier's checkpoint, or only count people's answers."""
    if settings.answers:
        key = pipeline.folder(settings, ckpt) / "packet-key.json"
        scores = survey.score(key, *terminal.file_list(settings.answers, "--answers"))
        print(report.people_table(scores))
    else:
        pipeline.Pipeline(settings, ckpt).run()


COMMAND = terminal.Command(Settings, run)
