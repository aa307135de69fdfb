"""`interpret.py concepts CKPT`: discrete concepts of a classifier, and what the classifier makes of them.

Settings and the door; the stages are in stages.py, which is loaded when the command runs.
"""

from dataclasses import dataclass
from pathlib import Path

from crate_mini import UserError, cli

STAGES = ("vectors", "discover", "controls", "salience", "faithfulness", "judge", "report")


@dataclass
class Settings:
    """Discrete concepts between two layers of a classifier (train.py --task classify).

    Is the classifier worse off without the concept of the word that counted most? Controls beside all of it.
    """

    from_: str = ""  # stage to start at again: vectors | discover | controls | salience |
    # faithfulness | judge | report
    layers: str = ""  # lower and upper layer, like 1,3 (default: the last, and 2 or a third of all
    # below, what is more; 0 would be the embeddings)
    k: int = 0  # codes of each method (0: one for 200 training words, 8 to 400)
    methods: str = "all"  # comma-separated: clvq, vq, kmeans, ward (needs scikit-learn), sae; all:
    # those that can run
    seeds: str = "0"  # of discovery, partners, folds: like 0,1,2; pages are of the first
    least: int = 5  # times that training texts must have a word
    most: int = 20  # times that a word is taken, at most, from training texts
    tests: int = 500  # test texts to judge on, the first (0: all)
    whole: int = 200  # of them, those where every place loses the concept, which costs the most
    nodes: int = 16  # of the path of integrated gradients
    epochs: int = 50  # of clvq and vq, at most
    memory: str = "q"  # what clvq's decoder reads beside the codes: q (nothing else) | z (paper)
    mask: str = "causal"  # which words it sees: causal | none (paper)
    revive: bool = False  # give codes of clvq and vq that no word chose a new place
    controls: bool = True  # train the decoders that show what reconstruction is worth
    shown: int = 20  # codes of each method on the page, drawn by the first seed
    judges: str = ""  # language models that rate concepts: hf:NAME, http:MODEL, comma-separated
    items: int = 50  # test texts that they rate
    url: str = "http://127.0.0.1:8080/v1"  # base URL of an OpenAI-compatible server, for http:MODEL
    key_env: str = "OPENAI_API_KEY"  # environment variable that holds the server's key
    budget: int = 0  # tokens that judges may spend (0: any number)
    replay: str = ""  # file to take all judges' answers from: no model is needed
    record: str = ""  # file to keep the judges' answers in
    answers: str = ""  # only count people's answers to the packet in these files, comma-separated
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    out: str | None = None  # folder of the results (default `concepts` beside the checkpoint)

    def check(self):
        """Raise UserError for a value that no run can have."""
        if self.from_ and self.from_ not in STAGES:
            raise UserError(
                f"--from {self.from_!r} is unknown{cli.nearest(self.from_, STAGES)}; choose one "
                f"of {', '.join(STAGES)}."
            )
        for name, least in (
            ("k", 0),
            ("least", 1),
            ("most", 1),
            ("tests", 0),
            ("whole", 0),
            ("nodes", 1),
            ("epochs", 1),
            ("shown", 1),
            ("items", 1),
            ("budget", 0),
        ):
            if not least <= getattr(self, name) < 2**31:
                raise UserError(
                    f"--{name} {getattr(self, name)} must lie in {least} to 2147483647; leave it "
                    "out for the default."
                )


def run(s, ckpt):
    """What `interpret.py concepts` does."""
    from crate_mini.concepts import pipeline as stages
    from crate_mini.concepts import report as result
    from crate_mini.concepts import survey as concept_packet

    s.check()
    if s.answers:
        out = Path(s.out) if s.out else Path(ckpt).resolve().parent / "concepts"
        print(result.people(concept_packet.score(out / "packet-key.json", *s.answers.split(","))))
        return
    stages.Concepts(s, ckpt).run()
