"""The language-model head: cross-entropy over the vocabulary, never holding all logits at once.

The (B*T, V) float32 logits and their gradient would be by far the largest tensors of a small model.
Here rows are processed in chunks that stay in cache: a chunk's logits, loss and gradient are
computed and then overwritten by the next chunk's.
"""

import torch

from crate_mini import fused

CHUNK = {"cpu": 2**20, "cuda": 2**26}  # logits at a time: they fit a CPU's cache, they fill a GPU


def cross_entropy(x, W, targets):
    """Mean cross-entropy in nats of x (..., d) on the tied embedding W (V, d), targets (...) ids.

    Under autocast the products run in the autocast dtype; the softmax, the loss and the sum of dW
    are float32. Value and gradients equal reference.cross_entropy up to that dtype's rounding.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or W.requires_grad)
    op = torch.ops.crate_kernels.head
    return op(x.flatten(0, -2), W, targets.flatten(), dtype, needs_grad)[0]


def head(x, W, targets, dtype, needs_grad):
    """Loss () float32 and its gradients in x (N, d) and W (V, d), which are empty unless needed."""
    N = len(x)
    rows = max(32, CHUNK.get(x.device.type, 2**20) // len(W))
    wide = torch.promote_types(torch.float32, dtype)
    x_cast, W_cast = x.to(dtype), W.to(dtype)
    loss = x.new_zeros((), dtype=wide)
    dx = torch.empty_like(x if needs_grad else x[:0])
    dW = torch.zeros_like(W if needs_grad else W[:0], dtype=wide)
    for i in range(0, N, rows):
        chunk, ids = x_cast[i : i + rows], targets[i : i + rows, None]
        logits = chunk @ W_cast.T  # (rows, V)
        p = torch.softmax(logits, -1, dtype=wide)
        # log sum exp = the largest logit - log its p, which cannot underflow
        largest_p, largest = p.max(-1, keepdim=True)
        log_sum_exp = logits.gather(1, largest).to(wide) - largest_p.log()
        loss += (log_sum_exp - logits.gather(1, ids).to(wide)).sum()
        if needs_grad:  # d loss / d logits = (softmax - one-hot) / N
            g = p.to(dtype).scatter_(1, ids, (p.gather(1, ids) - 1).to(dtype))
            dx[i : i + rows] = g @ W_cast
            dW += g.T @ chunk
    return loss / N, dx.div_(N), dW.div_(N).to(W.dtype)


def head_results(x, W, targets, dtype, needs_grad):
    loss = x.new_empty((), dtype=torch.promote_types(torch.float32, dtype))
    dx = torch.empty_like(x if needs_grad else x[:0])
    dW = torch.empty_like(W if needs_grad else W[:0])
    return loss, dx, dW


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, g, *_):
    dx, dW = ctx.saved_tensors
    return g.to(dx.dtype) * dx, g.to(dW.dtype) * dW, None, None, None


fused.register(head, head_results, 3, _backward, _save)
