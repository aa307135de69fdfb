"""The held-out text that layers are measured on."""

from crate_mini import UserError

DEFAULT_TOKENS = 65536


class Windows:
    """Batches of ids (B, T) of whole windows of held-out text, read again for each pass.

    Raises UserError if there are none.
    """

    def __init__(self, settings, corpus, T):
        if settings.tokens < T:
            raise UserError(
                f"--tokens {settings.tokens} must be at least {T}, the model's context; "
                f"leave it out for the default {DEFAULT_TOKENS}."
            )
        available = corpus.n_tokens["val"]
        if available <= T:
            raise UserError(
                f"the held-out text has {available} tokens and one window needs {T + 1}; give more "
                "text with --data, or hold out all of it with --val-fraction 1."
            )
        self.corpus = corpus
        self.T = T
        self.batch = settings.batch
        self.tokens = min(settings.tokens, available - 1) // T * T

    def __len__(self):
        return -(-self.tokens // (self.T * self.batch))

    def __iter__(self):
        for ids, _ in self.corpus.blocks("val", self.batch, self.T, self.tokens):
            yield ids
