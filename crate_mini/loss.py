"""The language-model head: cross-entropy over the vocabulary, never holding all logits at once.

The (B*T, V) float32 logits and their gradient would be by far the largest tensors of a small model.
So rows go in chunks, each overwriting the logits of the one before. csrc/head_cpu.cpp is faster.
"""

import torch
import torch.distributed as dist

from crate_mini import fused, ops

CHUNK = {"cpu": 2**23, "cuda": 2**27}  # logits at a time: more rows per reading of W, more memory
VISIBLE = ("cuda",)  # where torch.compile sees the head, and fuses what lies between its products
IGNORED = -100  # the target of a row that does not count, as in PyTorch


def cross_entropy(x, W, targets):
    """Mean cross-entropy in nats of x (..., d) on the tied embedding W (V, d), targets (...) ids.

    Rows whose target is -100 do not count; if none does, the loss is NaN and its gradients are 0.
    Under autocast products run in its dtype; softmax, loss and the sum of dW in float32. Equals
    reference.cross_entropy up to rounding. Raises UserError if shapes, devices or ids do not fit.
    """
    if not torch.compiler.is_compiling():  # the op will do it
        _check(x, W, targets)
    dtype, kernel = ops.choose("head", x)
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or W.requires_grad)
    rows, ids = x.reshape(targets.numel(), x.shape[-1]), targets.flatten()
    op = torch.ops.crate_kernels.head
    if torch.compiler.is_compiling() and x.device.type in VISIBLE and not dist.is_initialized():
        op = Visible.apply  # older versions of torch split no such graph for DDP
    return op(rows, W, ids, dtype, needs_grad, kernel)[0]


def _check(x, W, targets, kernel=False):
    op = "cross_entropy"
    fused.check_kinds(op, dict(x=x, W=W, targets=targets))
    V = max([1, *W.shape[:1]])
    fused.check_shapes(op, dict(x=x, W=W), {"V": V, "d": x.shape[-1]}, kernel)
    if targets.shape != x.shape[:-1] or targets.dtype not in (torch.int64, torch.int32):
        kind = f"{targets.dtype} {tuple(targets.shape)}"
        raise fused.misfit(op, f"targets is {kind}, expected int64 ids {tuple(x.shape[:-1])}")
    if targets.device.type != "cpu" or torch.compiler.is_compiling():  # to look would be to wait
        return
    bad = targets[(targets >= V) | ((targets < 0) & (targets != IGNORED))]
    if len(bad):
        ids = f"ids below {V}, or {IGNORED} to ignore"
        raise fused.misfit(op, f"targets holds {bad[0]}, expected {ids}")


def head(x, W, targets, dtype, needs_grad, kernel):
    """Loss () and its gradients in x (N, d) and W (V, d), which are empty unless needed.

    Computed in dtype, by the compiled kernel or in chunks.
    """
    x, W = x.to(dtype), W.to(dtype)
    _check(x, W, targets, kernel)
    results = head_results(x, W, targets, dtype, needs_grad)
    if kernel:
        scalars = fused.DTYPE_CODES[dtype], len(x), *W.shape
        return fused.launch("head", scalars, (x, W, targets.long()), results)
    return _in_chunks(x, W, targets, *results)


def head_results(x, W, targets, dtype, needs_grad, *_):
    wide = torch.promote_types(torch.float32, dtype)
    shapes = (), x.shape if needs_grad else 0, W.shape if needs_grad else 0
    return tuple(x.new_empty(shape, dtype=wide) for shape in shapes)


def chunk_rows(V, kind):
    """Rows of a chunk on this kind of device; on a GPU they fill whole tiles of a product."""
    rows = max(32, CHUNK.get(kind, 2**20) // V)
    return max(256, rows // 256 * 256) if kind == "cuda" else rows


def _in_chunks(x, W, targets, loss, dx, dW):
    """The same in plain PyTorch, written to loss, dx and dW."""
    rows = chunk_rows(len(W), x.device.type)
    counted = (targets != IGNORED).sum()
    loss.zero_()
    dW.zero_()
    for i in range(0, len(x), rows):
        chunk, ids = x[i : i + rows], targets[i : i + rows, None]
        counts, ids = ids != IGNORED, ids.clamp(min=0).long()
        logits = chunk @ W.T  # (rows, V)
        log_p = torch.log_softmax(logits, -1, dtype=loss.dtype)
        log_target = log_p.gather(1, ids)
        loss -= log_target.where(counts, 0).sum()
        if len(dW):  # d loss / d logits = (softmax - one-hot) / counted, over what is not needed
            g = torch.exp(log_p, out=logits if logits.dtype != log_p.dtype else log_p)
            g.scatter_(1, ids, log_target.expm1().to(g.dtype))
            dx[i : i + rows] = (g @ W) * counts
            dW += g.T @ (chunk * counts)
    loss /= counted
    for gradient in (dx, dW):
        gradient /= counted.clamp(min=1)
    return loss, dx, dW


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, g, *_):  # autograd casts each gradient to the dtype of its tensor
    dx, dW = ctx.saved_tensors
    return g * dx, g * dW, None, None, None, None


class Visible(torch.autograd.Function):
    """The same as an op, but for torch.compile its body is part of the graph."""

    forward, setup_context, backward = map(staticmethod, (head, _save, _backward))


fused.register(head, head_results, 3, _backward, _save)
