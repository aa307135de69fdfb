"""Train a CRATE language model, or its GPT-2 twin, on any text: `python train.py`.

Without flags it trains CRATE 3L (d = 128) on the English text that every Python installation
carries, in minutes on a laptop. `python train.py --help` lists all settings.

The path of a token, in `Trainer.one_step`: data.batches -> model.LM -> loss.cross_entropy ->
backward -> AdamW; then training.checkpoint. With several processes,

    torchrun --nproc-per-node 8 train.py

each takes its rows of the same global batch, so their number changes a run's speed but not its
result. `--task classify` fine-tunes a classifier on labelled texts (concepts/finetune.py).
"""

from crate_mini.console import interruptible_imports

with interruptible_imports(__name__):
    import math
    import shlex
    import signal
    import sys
    import time
    from contextlib import ExitStack, nullcontext
    from dataclasses import asdict
    from pathlib import Path

    import torch

    from crate_mini import UserError, model
    from crate_mini.console import terminal
    from crate_mini.data import batches
    from crate_mini.data.tokenizer import load_tokenizer
    from crate_mini.generate import generate
    from crate_mini.training import checkpoint, device, run_log
    from crate_mini.training.processes import Processes, disconnect, keep_process, rank_and_world
    from crate_mini.training.settings import parse, split_task

TRIAL_TOKENS = 1024  # of a step that is tried to choose the dtype


class Trainer:
    """One training run: build it, then call `train()`.

    weights, meta, state: as in settings.parse's `start`; None for a new model. command: the words
    after "python" that started the run.
    """

    def __init__(self, s, config, weights=None, meta=None, state=None, command=None):
        self.s, self.config = s, config
        self.command = shlex.join(["python", *(command or sys.argv)])
        self.step = 0  # steps done
        self.tokens = 0  # tokens trained on
        self.best = math.inf  # lowest validation loss
        self.improved = False  # whether that is of the present step
        self.skipped = 0  # steps whose loss or gradient was not finite
        self.seen_log = None  # of a resumed run: the fingerprint of its log.csv
        self.undo = ExitStack()  # undone when the run ends
        self.stopping = 0  # the signal on which all processes stop, or 0
        self.next_batch = None  # of the step to come, already on its way to the device
        device.keep_memory()
        self.processes = Processes(s.device)
        self.device = self.processes.device
        first = self.processes.is_first
        self.stop = terminal.StopRequest("finishing this step, then saving" if first else "")
        self.share = self.processes.share(s.batch_size)
        # Of the smallest dtype that may be chosen.
        smallest = torch.bfloat16 if s.dtype == "auto" else device.DTYPES[s.dtype]
        device.check_memory(config, min(self.share, s.micro_batch), self.device, smallest)
        if state is None:
            run_log.refuse_occupied(s.out, s.overwrite)
        self.machine = device.machine(self.device)  # once, so that no save waits for git
        self.tokenizer = load_tokenizer(s.tokenizer)
        self.corpus = self.open_corpus(meta, resumed=state is not None)
        compile_choice = device.choose_compile(self.device, s.compile)
        self.compiles, mode_reason = self.processes.agree(compile_choice)
        self.processes.connect()

        torch.manual_seed(s.seed)
        self.lm = model.LM(config)
        if weights:
            self.lm.load_state_dict(weights)
        self.lm.to(self.device)
        dtype_reason = self.choose_dtype()
        self.optimizer = self.make_optimizer()
        if state:
            self.restore(state, meta["training"])
        if s.tokens or s.epochs:
            from crate_mini.training import length  # needed only then

            length.set_steps(self)
        self.forward = self.processes.wrap(self.lm)
        self.undo.enter_context(device.tf32(self.device, self.dtype))
        self.introduce(mode_reason, dtype_reason)

    # ---- training --------------------------------------------------------------------------------

    def train(self):
        """Train from self.step to the last step; returns the exit code."""
        with self.stop:
            run_log.make_room(self)
            self.log = run_log.Log(self)
            if self.step == 0 and self.s.keep_every:
                self.save(run_log.kept_name(0), resume=False)
            while self.step < self.s.train_steps:
                with self.log.pace.step():
                    loss, norm, lr = self.one_step()
                self.keep(loss, norm, lr)
                if self.stopping and self.step < self.s.train_steps:
                    resume = terminal.flag_words("--resume", self.s.out)
                    self.say(
                        f"\nstopped after step {self.step} and saved; continue with\n"
                        f"  {terminal.typable('python', 'train.py', *resume)}"
                    )
                    self.processes.wait()  # one that leaves early would bring the others down
                    return 128 + self.stopping
            self.finish()
            self.processes.wait()
            return 0

    def keep(self, loss, norm, lr):
        """Log the step that was just done; validate and save, if that is due."""
        is_last = self.step == self.s.train_steps
        validation = {}
        if is_last or self.is_due(self.s.eval_every):
            validation = self.validate(self.s.eval_tokens)
        self.improved = bool(validation) and validation["val_loss"] < self.best
        if self.improved:
            self.best = validation["val_loss"]
        try:
            self.log.row(loss, norm, lr, validation)
            if self.improved:
                self.save("best", resume=False)
            if self.is_due(self.s.keep_every):
                self.save(run_log.kept_name(self.step), resume=False)
            if validation or self.stopping or self.is_due(self.s.save_every):
                self.save("last")
        except UserError as error:
            raise run_log.rescued(self, error) from None

    def is_due(self, every):
        """Whether something that happens every `every` steps (0: never) is due now."""
        return every > 0 and self.step % every == 0

    def one_step(self):
        """One optimizer step on the global batch; returns loss, gradient norm and learning rate."""
        s = self.s
        lr = s.lr_at(self.step)
        self.anneal_top_k()
        x, y = self.next_batch or self.batch(self.step)  # (share, T) ids; y is one token ahead
        self.lm.train()
        totals = torch.zeros(2, device=self.device)  # loss; nonzero if a signal was caught
        micro_batches = list(zip(x.split(s.micro_batch), y.split(s.micro_batch)))
        for i, (xs, ys) in enumerate(micro_batches, 1):
            if self.processes.world > 1:  # gradients travel once, with the last micro-batch
                self.forward.require_backward_grad_sync = i == len(micro_batches)
            with self.autocast():
                loss = self.forward(xs, ys) * (len(xs) / self.share)
            self.scaler.scale(loss).backward()
            totals[0] += loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.lm.parameters(), s.clip or math.inf)
        totals[1] = self.stop.caught  # read once: a signal may come at any time
        self.processes.add(totals)
        is_last = self.step + 1 == s.train_steps
        self.next_batch = None if is_last else self.batch(self.step + 1)
        # The one place where a step waits for its GPU.
        loss, stop, norm = torch.cat((totals, norm.view(1))).tolist()
        loss /= self.processes.world
        if stop:
            self.stopping = self.stop.caught or signal.SIGTERM
        self.step += 1
        self.tokens += s.batch_size * self.config.block_size
        self.update(loss, norm, lr)
        return loss, norm, lr

    def anneal_top_k(self):
        """Set the codes that this step keeps per token; validation always keeps --top-k."""
        kept = self.s.top_k_at(self.step, self.config.top_k, self.config.n_code)
        for block in self.lm.blocks:
            block.sparsifier.top_k.training_k = kept

    def batch(self, step):
        """This process's rows of the global batch of a step: (x, y), on its device."""
        s, T = self.s, self.config.block_size
        first = self.processes.rank * self.share
        rows = slice(first, first + self.share)
        batch = self.corpus.batch(s.seed, "train", step, s.batch_size, T, rows)
        return device.send(batch, self.device)

    def update(self, loss, norm, lr):
        """Update the weights, unless loss or gradient is not finite: then stop or skip the step.

        In float16 a gradient that is not finite is expected now and then: it is skipped, and the
        loss is scaled by half as much from then on.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif math.isfinite(loss) and self.scaler.is_enabled() and self.scaler.get_scale() > 1:
            self.skipped += 1
            self.scaler.update()
            self.note(
                f"step {self.step} skipped: a gradient was beyond float16's range; the loss is "
                f"scaled by {self.scaler.get_scale():g} now"
            )
        elif self.s.on_nonfinite == "stop":
            raise UserError(
                f"loss {loss}, gradient norm {norm} at step {self.step}, learning rate {lr:.2g}; "
                f"{run_log.how_to_resume(self.s.out)} Try a lower --lr, or --on-nonfinite skip."
            )
        else:
            self.skipped += 1
            self.scaler.update()
        self.optimizer.zero_grad()

    def autocast(self):
        """Autocast of matrix products to the chosen dtype; no effect in float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @torch.no_grad()
    def validate(self, limit=None):
        """Scores on the first `limit` held-out tokens, or on all of them.

        Returns {"val_loss" (nats per token), "bits_per_byte"} and, with --log-sparsity, "density",
        the share of nonzero codes.
        """
        sums = torch.zeros(2, 2, dtype=device.widest_float(self.device), device=self.device)
        losses, codes = sums  # (loss, tokens) and (nonzero codes, all codes)
        self.lm.eval()
        full = min(self.share, self.s.micro_batch), self.config.block_size
        done, total = 0, self.corpus.n_tokens["val"] - 1
        progress = None
        if limit is None and self.processes.is_first:
            progress = terminal.Progress("validate", total)
        for i, (x, y) in enumerate(self.corpus.blocks("val", *full, limit)):
            done += y.numel()
            if i % self.processes.world != self.processes.rank:
                continue
            x, y = device.send((x, y), self.device)
            # What training runs, compiled or not; a new shape would compile again.
            forward = self.forward if x.shape == full else self.lm
            with self.autocast():
                if self.s.log_sparsity:
                    for a in self.lm.trunk(x)[1]:
                        codes[0] += a.count_nonzero()
                        codes[1] += a.numel()
                losses[0] += forward(x, y).to(sums.dtype) * y.numel()
            losses[1] += y.numel()
            if progress:
                progress.update(done)
        self.processes.add(sums)
        loss = (losses[0] / losses[1]).item()
        bits = loss / math.log(2) * self.corpus.n_tokens["val"]
        scores = {"val_loss": loss, "bits_per_byte": bits / self.corpus.n_bytes["val"]}
        if self.s.log_sparsity:
            scores["density"] = (codes[0] / codes[1]).item()
        return scores

    # ---- checkpoints and the end -----------------------------------------------------------------

    def save(self, name, resume=True, out=None, **scores):
        """Write the checkpoint out/NAME: weights, training facts and, if `resume`, the state.

        out: another folder than the run's.
        """
        if not self.processes.is_first:
            return
        if out is None:
            self.log.check_folder()
        state = None
        if resume:
            state = {"step": self.step, "best": self.best, "skipped": self.skipped}
            state["tokens"] = self.tokens
            state["log"] = self.log.fingerprint()
            state["optimizer"] = self.optimizer.state_dict()
            if self.scaler.is_enabled():
                state["scaler"] = self.scaler.state_dict()
        training = {
            "settings": asdict(self.s),
            "step": self.step,
            "best_val_loss": self.best if self.best < math.inf else None,
            "corpus": self.corpus.meta,
            "machine": self.machine,
            "command": self.command,
            **scores,
        }
        checkpoint.save(
            Path(out or self.s.out, name),
            self.lm,
            resume=state,
            training=training,
            tokenizer={"spec": self.s.tokenizer, "hash": self.tokenizer.hash},
        )

    def restore(self, state, facts):
        """Restore the state that `save` wrote, except optimizer settings, which are this run's.

        facts: the training facts it was saved with.
        """
        self.step = state["step"]
        self.best = state["best"]
        self.skipped = state["skipped"]
        self.tokens = state["tokens"]
        self.seen_log = state.get("log")  # older checkpoints have none
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state.get("scaler", self.scaler.state_dict()))
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(
                f"the optimizer's state in {self.s.out}/last does not fit the model; start a new "
                f"run from its weights: --init {self.s.out}/last."
            ) from None
        new_groups = self.make_optimizer().param_groups
        for group, new in zip(self.optimizer.param_groups, new_groups):
            for name in ("weight_decay", "betas", "fused"):
                group[name] = new[name]
        now = {"settings": asdict(self.s), "corpus": self.corpus.meta}
        if run_log.measured(facts) != run_log.measured(now):
            self.best = math.inf
            self.say(
                "note      validation is on other tokens than before, some of which may have been "
                "trained on; `best` starts over"
            )

    def finish(self):
        """Validate on the whole held-out split, save, draw loss.png, print the conclusion."""
        s = self.s
        scores = self.validate()
        if not math.isfinite(scores["val_loss"]):
            best = Path(s.out, "best")
            hint = f"; the best weights are in {best}." if best.exists() else "."
            raise UserError(
                f"validation loss {scores['val_loss']} after the last step; try a lower --lr{hint}"
            )
        try:
            self.save("last", **scores)
        except UserError as error:
            raise run_log.rescued(self, error, **scores) from None
        if not self.processes.is_first:
            return
        from crate_mini.training.loss_curve import loss_curve  # needed only here
        from crate_mini.training.trigram import trigram_loss

        title = f"{s.init or s.model} {s.preset} on {s.data}"
        sample = self.sample(120)
        figure = None
        try:
            trigram = trigram_loss(self.corpus, self.tokenizer.vocab_size)
            figure = loss_curve(Path(s.out, "log.csv"), title, trigram)
        except UserError as error:
            self.say(f"note      loss.png is not drawn: {error}")
        self.say(run_log.conclusion(self, scores, sample, figure))

    def sample(self, n_tokens):
        """Text that the model writes after <|endoftext|>, as at the start of a document."""
        start = torch.tensor([[self.tokenizer.eot]], device=self.device)
        generator = torch.Generator(self.device).manual_seed(self.s.seed)
        with self.autocast():
            ids = generate(self.lm, start, n_tokens, 0.8, top_k=50, generator=generator)
        known = [i for i in ids[0, 1:].tolist() if i < self.tokenizer.vocab_size]
        return self.tokenizer.decode(known)

    # ---- before training -------------------------------------------------------------------------

    def open_corpus(self, meta, resumed):
        """The Corpus to train on; the first process prepares it while the others wait.

        meta: of the checkpoint that the weights come from, if any; its tokenizer must be this one.
        """
        s = self.s
        if meta:
            checkpoint.check_tokenizer(meta, self.tokenizer)

        def prepare():
            corpus = batches.open_corpus(
                s.data,
                self.tokenizer,
                val_fraction=s.val_fraction,
                log=self.say,
                text_field=s.text_field,
            )
            corpus.batch(s.seed, "train", 0, 1, self.config.block_size)  # raises if too short
            return corpus

        corpus = self.processes.first_then_others(prepare)
        before = meta["training"].get("corpus", {}) if resumed else corpus.meta
        names = ("text_sha256", "tokens", "bytes")
        if any(corpus.meta[name] != before.get(name) for name in names):
            self.say(
                f"note      {s.data} differs from the text this run began with; "
                "it continues with the new one"
            )
        return corpus

    def make_optimizer(self):
        """AdamW; weight decay on tensors of two or more dimensions, as in the paper."""
        s = self.s
        matrices = [w for w in self.lm.parameters() if w.dim() > 1]
        vectors = [w for w in self.lm.parameters() if w.dim() < 2]
        decayed = {"params": matrices, "weight_decay": s.weight_decay}
        others = {"params": vectors, "weight_decay": 0.0}
        fused = device.can_fuse_adam(self.device)
        return torch.optim.AdamW([decayed, others], s.lr, (s.beta1, s.beta2), fused=fused)

    def choose_dtype(self):
        """Choose the dtype of the products, and all that follows from it; returns the reason."""
        s, T = self.s, self.config.block_size
        rows = max(1, min(self.share, s.micro_batch, TRIAL_TOKENS // T))
        x, y = self.corpus.batch(s.seed, "train", 0, rows, T)

        def step_seconds(dtype):
            start = time.perf_counter()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = self.lm(x, y)
            loss.backward()
            return time.perf_counter() - start

        choice = device.choose_dtype(self.device, s.dtype, True, step_seconds)
        self.lm.zero_grad()
        self.dtype, reason = self.processes.agree(choice)
        s.dtype = str(self.dtype).removeprefix("torch.")  # a resume keeps this choice
        in_fp16 = self.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=in_fp16)
        device.check_memory(self.config, min(self.share, s.micro_batch), self.device, self.dtype)
        return reason

    def introduce(self, mode_reason, dtype_reason):
        """Print what will run and why, and an estimate of time and memory from one trial step."""
        s = self.s
        self.flops = device.flops_per_token(self.config)
        self.peak, peak_reason = device.peak_flops(self.device, self.dtype)
        mode = "torch.compile" if self.compiles else "eager"
        self.say(run_log.introduction(self, mode, mode_reason, dtype_reason, peak_reason))
        seconds = None
        if not self.compiles or s.compile == "auto":
            seconds = self.trial()
        if self.compiles:
            seconds = self.compile(seconds)
        moments = 8 * sum(w.numel() for w in self.lm.parameters())  # Adam's, not allocated yet
        memory = device.peak_memory(self.device) + moments
        self.say(
            f"expected  {seconds / 60:.1f} minutes, {memory / 2**30:.1f} GiB, from one trial step"
        )

    def compile(self, eager_seconds):
        """Compile self.forward, if that works and pays; returns the seconds of all steps to come.

        eager_seconds: what they take otherwise; None: compile in any case.
        """
        eager = self.forward
        problem = None
        if eager_seconds is not None:
            problem = self.processes.agree(device.compile_loses(eager_seconds))
        if problem is None:
            self.forward = torch.compile(eager)
            # Top-k compiles again when it keeps fewer codes.
            self.undo.enter_context(torch._dynamo.config.patch(recompile_limit=32))
            try:
                return self.trial()
            except (UserError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # of a compiler: it must not end a run that can do without
                problem = terminal.compiler_message(error)
                if eager_seconds is None:
                    raise device.cannot_compile(problem) from error
            self.forward = eager
            self.lm.zero_grad()
        self.compiles = False
        self.note(f"eager after all: {problem}")
        return eager_seconds

    def trial(self):
        """Try a step without its update; returns the seconds that all steps to come would take."""
        s = self.s
        rows = min(self.share, s.micro_batch)
        batch = self.corpus.batch(s.seed, "train", 0, rows, self.config.block_size)
        x, y = device.send(batch, self.device)
        device.forget_peak(self.device)
        self.anneal_top_k()
        self.lm.train()
        for _ in range(2):  # the first one warms up
            start = time.perf_counter()
            with self.autocast():
                loss = self.forward(x, y)
            loss.backward()
            loss.item()
            seconds = time.perf_counter() - start
        self.lm.zero_grad()
        return seconds / rows * self.share * (s.train_steps - self.step)

    def note(self, text):
        """Print a remark on a line of its own, in the first process only."""
        if self.processes.is_first:
            terminal.show_line(f"note      {text}", last=True)

    def say(self, *words):
        """Print, in the first process only."""
        if self.processes.is_first:
            print(*words, flush=True)


def main(argv=None, command=None):
    """Run the command line's task, training or classification; returns the exit code.

    argv: its words, by default this process's. command: what checkpoints record instead of them.
    """
    task, words = split_task(sys.argv[1:] if argv is None else argv)
    if task == "classify":
        from crate_mini.concepts import finetune

        return finetune.main(words)
    s, config, start = parse(words)
    command = command or (sys.argv if argv is None else ["train.py", *argv])
    rank, _ = rank_and_world()
    trainer = None
    try:
        with keep_process(), run_log.claim(s.out) if rank == 0 else nullcontext():
            trainer = Trainer(s, config, **start, command=command)
            return trainer.train()
    finally:
        if trainer:
            trainer.undo.close()
            trainer.forward = None  # DistributedDataParallel holds the process group,
            if trainer.compiles:
                torch.compiler.reset()  # and compiled code holds that
        disconnect()


if __name__ == "__main__":
    terminal.run(main)
