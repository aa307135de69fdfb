"""Train a CRATE language model, or its GPT-2 twin, on any text: `python train.py`.

With no flag: CRATE 3L (d = 128) on the English that every Python installation carries, minutes on a laptop.
The path of a token: data.batch -> LM.forward -> head.cross_entropy -> backward -> AdamW -> checkpoint.save.
Many processes: `torchrun --nproc-per-node 8 train.py ...`; each takes its rows of the same global batch, so
the number of processes changes the speed and not the run. `python train.py --help` lists every setting.
`--task classify` makes a classifier of a checkpoint instead, on labelled texts (crate_mini/concepts/finetune.py).
"""

import gc
import math
import os
import shlex
import shutil
import signal
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # before init_process_group: its default arguments would keep the group alive
from torch.nn.parallel import DistributedDataParallel

from crate_mini import UserError, cli, model
from crate_mini.concepts import finetune as classify
from crate_mini.data import batches as data
from crate_mini.training import checkpoint
from crate_mini.training import device as machine
from crate_mini.training import loss_curve as report
from crate_mini.training import run_log as progress
from crate_mini.training.settings import parse


class Run:
    """One training run, built once, then `train()`. A resume needs its step, best, weights and optimizer."""

    def __init__(self, s, config, weights=None, meta=None, state=None):
        self.s, self.config, self.step, self.best, self.skipped = s, config, 0, math.inf, 0
        self.caught = self.signal = 0  # as it came; as all processes agreed
        machine.keep_memory()
        self.join()
        self.dtype, why_dtype = self.agree(machine.choose_dtype(self.device, s.dtype))
        s.dtype = str(self.dtype)[6:]  # a resume must not measure again
        compiled, why_compile = machine.choose_compile(self.device, s.compile)
        machine.check_memory(config, min(self.share, s.micro_batch), self.device, self.dtype)
        self.corpus = self.open_data(meta, resumed=state is not None)
        torch.manual_seed(s.seed)
        self.lm = model.LM(config)
        if weights:
            self.lm.load_state_dict(weights)
        self.lm.to(self.device)
        self.optimizer = self.make_optimizer()
        if state:
            self.step, self.best, self.skipped = state["step"], state["best"], state["skipped"]
            self.optimizer.load_state_dict(state["optimizer"])  # and flags of today over it:
            for group, new in zip(self.optimizer.param_groups, self.make_optimizer().param_groups):
                group.update({name: new[name] for name in ("weight_decay", "betas", "fused")})
        self.forward = torch.compile(self.lm) if compiled else self.lm
        if self.world > 1:
            self.forward = DistributedDataParallel(self.forward)
        self.introduce("torch.compile" if compiled else "eager", why_compile, why_dtype)

    def join(self):
        """Find this process's place among those of torchrun (alone without it) and its device."""
        s = self.s
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = self.world > 1 and s.device in ("auto", "cuda") and torch.cuda.is_available()
        self.device = machine.choose_device(
            f"cuda:{os.environ['LOCAL_RANK']}" if cuda else s.device
        )
        if s.batch_size % self.world:
            raise UserError(
                f"--batch-size {s.batch_size} does not divide among {self.world} processes; "
                f"try --batch-size {max(1, s.batch_size // self.world) * self.world}."
            )
        if self.world > 1:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            dist.init_process_group(
                "nccl" if self.device.type == "cuda" else "gloo", timeout=timedelta(days=1)
            )  # the first may tokenize for hours
        self.share = s.batch_size // self.world

    def agree(self, value):
        """The first process's value, in all processes."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values, 0)
        return values[0]

    def open_data(self, meta, resumed):
        """Tokenizer and corpus; with many processes the first builds the token files and the others wait.

        meta: of the checkpoint that the weights come from, whose tokenizer must be this one.
        """
        s = self.s
        self.tokenizer = data.load_tokenizer(s.tokenizer)
        if meta:
            checkpoint.check_tokenizer(meta, self.tokenizer)
        if self.rank:
            dist.barrier()
        corpus = data.open_corpus(s.data, self.tokenizer, val_fraction=s.val_fraction, log=self.say)
        corpus.batch(
            s.seed, "train", 0, 1, self.config.block_size
        )  # says so if the context does not fit
        if self.world > 1 and not self.rank:
            dist.barrier()
        if resumed and corpus.meta != meta["training"]["corpus"]:
            self.say(
                f"note      {s.data} is not the text this run began with; it goes on with the new one"
            )
        return corpus

    def make_optimizer(self):
        """AdamW; weight decay on every tensor of two or more dimensions, as the paper."""
        s, w = self.s, list(self.lm.parameters())
        groups = [
            {"params": [p for p in w if p.dim() > 1], "weight_decay": s.weight_decay},
            {"params": [p for p in w if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            groups, s.lr, betas=(s.beta1, s.beta2), fused=self.device.type != "mps"
        )

    def say(self, *words):
        """Print, in the first process only."""
        if not self.rank:
            print(*words, flush=True)

    def amp(self):
        """Autocast to the chosen dtype; nothing at all in float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def introduce(self, mode, why_mode, why_dtype):
        """Say what will run, where and why; one trial step, thrown away, tells the minutes and the memory."""
        s = self.s
        self.flops = model.flops_per_token(self.config)
        self.peak, why_peak = machine.peak_flops(self.device, self.dtype)
        self.say(progress.introduction(self, mode, why_mode, why_dtype, why_peak))
        rows, T = min(self.share, s.micro_batch), self.config.block_size
        x, y = (t.to(self.device) for t in self.corpus.batch(s.seed, "train", 0, rows, T))
        for _ in range(2):
            start = time.perf_counter()
            with self.amp():
                loss = self.lm.eval()(x, y)
            loss.backward()
            loss.item()
        minutes = (
            (time.perf_counter() - start) / rows * self.share * (s.train_steps - self.step) / 60
        )
        self.lm.zero_grad()
        memory = machine.peak_memory(self.device) + 8 * sum(w.numel() for w in self.lm.parameters())
        self.say(
            f"expected  {minutes:.1f} minutes, {memory / 2**30:.1f} GiB, judged by one trial step"
        )

    def train(self):
        """All steps from self.step on, with validations, checkpoints and the log; returns the exit code."""
        s = self.s
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)
        if not self.step and not self.rank:  # what --overwrite replaces
            for name in ("last", "best"):
                shutil.rmtree(Path(s.out, name), ignore_errors=True)
        log = progress.Log(self)
        while self.step < s.train_steps:
            loss, norm, lr = self.one_step()
            last = self.step == s.train_steps
            due = last or s.eval_every and self.step % s.eval_every == 0
            val = self.validate(s.eval_tokens) if due else {}
            log.row(loss, norm, lr, val)
            if val and val["val_loss"] < self.best:
                self.best = val["val_loss"]
                self.save("best", resume=False)
            if due or self.signal or s.save_every and self.step % s.save_every == 0:
                self.save("last")
            if self.signal and not last:
                self.say(
                    f"\nstopped after step {self.step} and saved; go on with\n"
                    f"  python train.py --resume {shlex.quote(s.out)}"
                )
                return self.leave(128 + self.signal)
        self.finish()
        return self.leave(0)

    def leave(self, code):
        """Return the exit code when all processes are here: who left alone would take the others down."""
        if self.world > 1:
            dist.barrier()
        return code

    def one_step(self):
        """One optimizer step on the global batch of self.step. Returns loss, gradient norm, learning rate."""
        s, lr = self.s, self.s.lr_at(self.step)
        rows = slice(self.rank * self.share, (self.rank + 1) * self.share)
        x, y = (
            t[rows].to(self.device, non_blocking=True)
            for t in self.corpus.batch(
                s.seed, "train", self.step, s.batch_size, self.config.block_size
            )
        )
        self.lm.train()
        told = torch.zeros(2, device=self.device)  # loss, and whether a signal came
        for i, (xs, ys) in enumerate(zip(x.split(s.micro_batch), y.split(s.micro_batch)), 1):
            if self.world > 1:  # gradients travel once, with the last micro-batch
                self.forward.require_backward_grad_sync = i * s.micro_batch >= self.share
            with self.amp():
                loss = self.forward(xs, ys) * (len(xs) / self.share)
            loss.backward()
            told[0] += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.lm.parameters(), s.clip or math.inf)
        told[1] = self.caught  # looked at once: it may come any time
        if self.world > 1:
            dist.all_reduce(told)
            told[0] /= self.world
        loss, norm = told[0].item(), norm.item()
        self.signal = (self.caught or signal.SIGTERM) if told[1] else 0
        self.step += 1
        if math.isfinite(loss) and math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        elif s.on_nonfinite == "stop":
            raise UserError(
                f"loss {loss}, gradient norm {norm} at step {self.step}, learning rate {lr:.2g}; "
                f"{self.last_good()} Try a lower --lr, or --on-nonfinite skip."
            )
        else:
            self.skipped += 1
        self.optimizer.zero_grad()
        return loss, norm, lr

    def on_signal(self, number, frame):
        """Finish the step and save; a second Ctrl-C acts at once."""
        self.caught = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not self.rank:
            with suppress(OSError):  # print is not safe here
                os.write(1, b"\nfinishing this step, then saving; Ctrl-C again stops at once\n")

    def last_good(self):
        """A sentence that says how to go on from the newest checkpoint of this run."""
        if not Path(self.s.out, "last", "config.json").exists():
            return "no checkpoint was due yet."
        return f"--resume {shlex.quote(self.s.out)} goes on from the last good checkpoint."

    @torch.no_grad()
    def validate(self, limit=None):
        """On the first `limit` held-out tokens: val_loss (nats), bits_per_byte, density if asked for."""
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        told = torch.zeros(4, dtype=wide, device=self.device)  # loss sum, tokens, live codes, codes
        self.lm.eval()
        blocks = self.corpus.blocks("val", self.s.micro_batch, self.config.block_size, limit)
        for i, (x, y) in enumerate(blocks):
            if i % self.world == self.rank:
                with self.amp():
                    if self.s.log_sparsity:
                        for a in self.lm.trunk(x.to(self.device))[1]:
                            told[2:] += torch.tensor(
                                [a.count_nonzero(), a.numel()], device=self.device
                            )
                    loss = self.lm(x.to(self.device), y.to(self.device))
                told[:2] += torch.tensor([loss.item() * y.numel(), y.numel()], device=self.device)
        if self.world > 1:
            dist.all_reduce(told)
        loss = (told[0] / told[1]).item()
        val = {
            "val_loss": loss,
            "bits_per_byte": loss
            / math.log(2)
            * self.corpus.n_tokens["val"]
            / self.corpus.n_bytes["val"],
        }
        return {**val, "density": (told[2] / told[3]).item()} if self.s.log_sparsity else val

    def save(self, name, resume=True, **facts):
        """Write the checkpoint out/NAME: last (with all that a resume needs) or best (weights only)."""
        if self.rank:
            return
        state = (
            {
                "step": self.step,
                "best": self.best,
                "skipped": self.skipped,
                "optimizer": self.optimizer.state_dict(),
            }
            if resume
            else None
        )
        training = {
            "settings": asdict(self.s),
            "step": self.step,
            "best_val_loss": self.best,
            "corpus": self.corpus.meta,
            "machine": machine.describe(self.device),
            "command": shlex.join(["python", *sys.argv]),
            **facts,
        }
        try:
            checkpoint.save(
                Path(self.s.out, name),
                self.lm,
                resume=state,
                training=training,
                tokenizer={"spec": self.s.tokenizer, "hash": self.tokenizer.hash},
            )
        except UserError as error:  # a full disk
            raise UserError(f"{error} {self.last_good()}") from None

    def finish(self):
        """The whole held-out split, a sample, the figure, and what to type next."""
        s, val = self.s, self.validate()
        if not math.isfinite(val["val_loss"]):
            best = Path(s.out, "best")
            raise UserError(
                f"validation loss {val['val_loss']} after the last step; try a lower --lr"
                + (f"; the best weights are in {best}." if best.exists() else ".")
            )
        self.save("last", **val)
        if self.rank:
            return
        start = torch.tensor([[self.tokenizer.eot]], device=self.device)
        with self.amp():
            ids = self.lm.generate(
                start,
                120,
                temperature=0.8,
                top_k=50,
                generator=torch.Generator(self.device).manual_seed(s.seed),
            )
        sample = self.tokenizer.decode(
            [i for i in ids[0, 1:].tolist() if i < self.tokenizer.vocab_size]
        )
        figure = report.loss_curve(
            Path(s.out, "log.csv"), f"{s.init or s.model} {s.preset} on {s.data}"
        )
        self.say(progress.conclusion(self, val, sample, figure))


def main(argv=None):
    task, argv = classify.task(sys.argv[1:] if argv is None else argv)
    if task == "classify":
        return classify.main(argv)
    s, config, start = parse(argv)
    first, run = int(os.environ.get("RANK", 0)) == 0, None
    try:
        with progress.claim(s.out) if first else nullcontext():
            run = Run(s, config, **start)
            return run.train()
    finally:
        if dist.is_initialized():
            if run:  # its gradients' reducer shares the group, whose threads end with the last who holds it;
                run.forward = None  # one that lets go of a tensor while Python exits would abort us
            gc.collect()
            dist.destroy_process_group()


if __name__ == "__main__":
    cli.run(main)
