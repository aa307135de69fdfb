"""The language-model head: cross-entropy over the vocabulary without ever holding all logits.

(B*T, V) fp32 logits and their gradient would be the largest tensors of a small model by far. Here rows go
through in chunks that stay in cache: a chunk's logits, its loss and its gradient are made, used, overwritten.
"""

import torch

CHUNK = {"cpu": 2**20, "cuda": 2**26}  # logits alive at a time: a CPU's cache, a GPU's fill


def cross_entropy(x, W, targets):
    """Mean cross-entropy in nats. x (..., d) normed stream, W (V, d) tied embedding, targets (...) ids.

    Under autocast the products run in the autocast dtype; the softmax, the loss and the sum of dW are fp32.
    Equals reference.cross_entropy, value and gradients, within that dtype's rounding.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or W.requires_grad)
    return _head(x.flatten(0, -2), W, targets.flatten(), dtype, needs_grad)[0]


@torch.library.custom_op("crate_mini::head", mutates_args=())
def _head(
    x: torch.Tensor, W: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype, needs_grad: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss () fp32 and, if needed, its gradients in x (N, d) and W (V, d), made while the chunk is warm."""
    n, size = len(x), max(32, CHUNK.get(x.device.type, 2**20) // len(W))
    wide = torch.promote_types(torch.float32, dtype)
    xs, Wd = x.to(dtype), W.to(dtype)
    loss = x.new_zeros((), dtype=wide)
    dx = torch.empty_like(x if needs_grad else x[:0])
    dW = torch.zeros_like(W if needs_grad else W[:0], dtype=wide)
    for i in range(0, n, size):
        rows, t = xs[i : i + size], targets[i : i + size, None]
        logits = rows @ Wd.T  # (size, V)
        p = torch.softmax(logits, -1, dtype=wide)
        top, at = p.max(
            -1, keepdim=True
        )  # log sum exp = top logit - log its p, which no underflow can reach
        loss += (logits.gather(1, at).to(wide) - top.log() - logits.gather(1, t).to(wide)).sum()
        if needs_grad:  # d loss / d logits = (softmax - onehot) / n
            g = p.to(dtype).scatter_(1, t, (p.gather(1, t) - 1).to(dtype))
            dx[i : i + size] = g @ Wd
            dW += g.T @ rows
    return loss / n, dx.div_(n), dW.div_(n).to(W.dtype)


@_head.register_fake
def _(x, W, targets, dtype, needs_grad):
    loss = x.new_empty((), dtype=torch.promote_types(torch.float32, dtype))
    return (
        loss,
        torch.empty_like(x if needs_grad else x[:0]),
        torch.empty_like(W if needs_grad else W[:0]),
    )


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, g, *_):
    dx, dW = ctx.saved_tensors
    return g.to(dx.dtype) * dx, g.to(dW.dtype) * dW, None, None, None


_head.register_autograd(_backward, setup_context=_save)
