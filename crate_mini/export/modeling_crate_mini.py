"""CRATE and its GPT-2 twin for Hugging Face transformers, complete in this file.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

`python -m crate_mini.export CKPT --to hf` copies it into the folder. It needs torch and
transformers alone, and its modules have the names of crate_mini/model.py: layer l's neurons are the
output of `blocks[l].sparsifier.code`, the projections u that of `blocks[l].attention.subspace`.
Plain PyTorch. `generate` keeps a KV cache: an MSSA layer's projections u, once, as keys and values
are both u; keys are shifted after they come from the cache, so the last u of the text is there.
"""

from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# What this transformers calls the KV cache: "cache", or in earlier releases "past_key_values".
IS_RENAMED = "cache" in CausalLMOutputWithPast.__dataclass_fields__
CACHE = "cache" if IS_RENAMED else "past_key_values"


class CrateMiniConfig(PretrainedConfig):
    """crate_mini["config"] holds the fields of crate_mini.model.Config."""

    model_type = "crate_mini"

    def __init__(self, crate_mini=None, **kwargs):
        self.crate_mini = crate_mini or {}
        shape = self.crate_mini.get("config", {})
        self.vocab_size = shape.get("vocab_size", 0)
        self.hidden_size = shape.get("n_embd", 0)
        self.num_hidden_layers = shape.get("n_layer", 0)
        self.num_attention_heads = shape.get("n_head", 0)
        self.max_position_embeddings = shape.get("block_size", 0)
        super().__init__(**{"use_cache": True, "tie_word_embeddings": False, **kwargs})


def shift_keys(k, gate):
    """Each key mixed with the key before it: k_s + sigmoid(gate) (k_{s-1} - k_s)."""
    before = F.pad(k, (0, 0, 1, -1))
    share = gate.sigmoid().unflatten(0, (k.shape[1], 1, -1)).to(k.dtype)
    return k + share * (before - k)


class Attention(nn.Module):
    """MSSA (q = k = v = U^T LN(z)) or MHSA, causal; z (B, T, d) -> same."""

    def __init__(self, c, layer):
        super().__init__()
        self.layer = layer
        d, rank = c.n_embd, c.query_rank
        self.n_head, self.is_mssa = c.n_head, c.attention == "mssa"
        self.norm = nn.LayerNorm(d, bias=c.bias)
        self.out = nn.Linear(d, d, bias=c.bias)
        self.query = None
        if self.is_mssa:
            self.U = nn.Parameter(torch.empty(d, d))
            self.subspace = nn.Identity()
            if rank:
                self.query = nn.ParameterList([torch.empty(d, rank), torch.empty(rank, d)])
        else:
            self.qkv = nn.Linear(d, 3 * d, bias=c.bias)
        self.key_gate = nn.Parameter(torch.zeros(d)) if c.key_shift else None

    def heads(self, u):
        """(B, T, d) -> (B, K, T, p)."""
        return u.unflatten(-1, (self.n_head, -1)).transpose(1, 2)

    def extend(self, cache, k, v):
        """All S keys and values of the text: those in the cache, and these of its last T tokens."""
        if not self.is_mssa:
            return cache.update(k, v, self.layer)
        u, _ = cache.update(k, v[..., :0], self.layer)
        return u, u

    def forward(self, z, real, cache):
        """The last T of S tokens, the others in the cache (None: S = T); returns (B, T, d).

        real (B, S): False for padding, which no token attends to; None without padding.
        """
        x = self.norm(z)
        if self.is_mssa:
            u = q = self.subspace(x @ self.U)
            if self.query is not None:
                q = u + u @ self.query[0] @ self.query[1]
            q, k, v = self.heads(q), self.heads(u), self.heads(u)
        else:
            q, k, v = (self.heads(t) for t in self.qkv(x).chunk(3, -1))
        if cache is not None:
            k, v = self.extend(cache, k, v)
        if self.key_gate is not None:
            k = shift_keys(k if real is None else k * real[:, None, :, None], self.key_gate)
        mask = visible(q.shape[2], k.shape[2], real, z.device)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return self.out(y.transpose(1, 2).flatten(-2))


def visible(T, S, real, device):
    """Which of S keys each of the last T tokens sees: (T, S) or (B, 1, T, S), None if causal."""
    if real is None and T == S:
        return None
    keys = torch.arange(S, device=device)
    queries = keys[S - T :, None]
    if real is None:
        return keys <= queries
    itself = keys == queries  # else the rows of padding would be NaN
    return (keys <= queries) & (real[:, None, None] | itself)


def top_k(a, k):
    """The k largest codes of each token, the others 0; all of them if k is 0."""
    if not 0 < k < a.shape[-1]:
        return a
    values, indices = a.topk(k, sorted=False)
    return torch.zeros_like(a).scatter(-1, indices, values)


class ISTA(nn.Module):
    """Sparse coding of LN(z) on the dictionary D: a <- ReLU(a + eta D^T (x - D a) - eta lam)."""

    def __init__(self, c):
        super().__init__()
        d, h = c.n_embd, c.expansion * c.n_embd
        self.c = c
        self.norm = nn.LayerNorm(d, bias=c.bias)
        self.D = nn.Parameter(torch.zeros(d, h))
        self.decoder = nn.Parameter(torch.empty(d, h)) if c.separate_decoder else None
        self.log_lam = nn.Parameter(torch.empty(h)) if c.learned_lam else None
        self.code = nn.Identity()
        if c.unit_norm:
            nn.utils.parametrizations.spectral_norm(self, "D")

    def forward(self, z):
        c, D, x = self.c, self.D, self.norm(z)
        lam = c.lam if self.log_lam is None else self.log_lam.exp()
        a = F.relu(c.eta * (x @ D) - c.eta * lam)
        for _ in range(c.ista_steps - 1):
            a = F.relu(a + c.eta * ((x - a @ D.T) @ D) - c.eta * lam)
        if c.debias:
            a = torch.where(a == 0, a, a + c.eta * lam)
        a = self.code(top_k(a, c.top_k))
        return a @ (D if self.decoder is None else self.decoder).T


class MLP(nn.Module):
    """The twin's sparsifier: W2 ReLU(W1 LN(z)), or GELU in its tanh form."""

    def __init__(self, c):
        super().__init__()
        d, h = c.n_embd, c.expansion * c.n_embd
        self.norm = nn.LayerNorm(d, bias=c.bias)
        self.fc = nn.Linear(d, h, bias=c.bias)
        self.proj = nn.Linear(h, d, bias=c.bias)
        self.gelu, self.k = c.activation == "gelu", c.top_k
        self.code = nn.Identity()

    def forward(self, z):
        x = self.fc(self.norm(z))
        a = F.gelu(x, approximate="tanh") if self.gelu else F.relu(x)
        return self.proj(self.code(top_k(a, self.k)))


class Block(nn.Module):
    """z <- z + attention(z), then z <- sparsifier(z), or z + sparsifier(z) if residual."""

    def __init__(self, c, layer):
        super().__init__()
        self.attention = Attention(c, layer)
        self.sparsifier = ISTA(c) if c.sparsifier == "ista" else MLP(c)
        self.residual = c.residual

    def forward(self, z, real, cache):
        z = z + self.attention(z, real, cache)
        y = self.sparsifier(z)
        return z + y if self.residual else y


class CrateMiniForCausalLM(PreTrainedModel, GenerationMixin):
    """Embeddings, blocks, final LayerNorm, head tied to the embedding."""

    config_class = CrateMiniConfig
    base_model_prefix = ""
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        c = SimpleNamespace(**config.crate_mini["config"])
        self.tokens = nn.Embedding(c.vocab_size, c.n_embd)
        self.positions = nn.Embedding(c.block_size, c.n_embd)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.n_layer))
        self.norm = nn.LayerNorm(c.n_embd, bias=c.bias)
        self.post_init()

    def _init_weights(self, module):
        """Weights always come from the checkpoint."""

    def get_input_embeddings(self):
        return self.tokens

    def set_input_embeddings(self, value):
        self.tokens = value

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        """The tokens that are not in the cache yet.

        Beyond the context the window slides, which changes every position: as many tokens from the
        end as the model reads, without the cache. Raises ValueError if they are not in input_ids,
        and if none is new.
        """
        context, cache = self.config.max_position_embeddings, kwargs.get(CACHE)
        T, S = input_ids.shape[1], input_ids.shape[1]
        if attention_mask is not None:
            S = attention_mask.shape[1]  # more than T if the text before is in the cache alone
        if cache is None or S > context:
            if S > max(T, context):
                raise ValueError(
                    f"{S} tokens are more than the context of {context}, which then slides: "
                    "call generate with all input_ids and without a cache."
                )
            mask = None if attention_mask is None else attention_mask[:, -context:]
            return {"input_ids": input_ids[:, -context:], "attention_mask": mask}
        known = cache.get_seq_length()
        if known >= S:
            raise ValueError(
                f"the cache holds {known} tokens and the text has {S}, so none is new; give a text "
                "that goes on after the cache."
            )
        new = input_ids[:, known - S :]
        return {"input_ids": new, "attention_mask": attention_mask, CACHE: cache}

    def forward(
        self,
        input_ids,
        attention_mask=None,
        labels=None,
        output_hidden_states=None,
        use_cache=False,
        cache=None,
        past_key_values=None,
        **_,
    ):
        """Logits (B, T, V) of ids (B, T); attention_mask (B, T): 0 for padding, on either side.

        With labels (B, T), -100 where none, also the mean loss in nats per token. hidden_states:
        the stream before the first block and after each, then after the final norm. cache, or
        past_key_values: a DynamicCache of the text before, which these T tokens continue and enter;
        attention_mask is then that of the whole text. use_cache starts one and returns it.
        """
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        before = 0 if cache is None else cache.get_seq_length()
        end = before + input_ids.shape[1]
        real, positions = None, torch.arange(before, end, device=input_ids.device)
        if attention_mask is not None and not attention_mask.all():
            real = attention_mask.bool()
            positions = (real.cumsum(-1) - 1).clamp_min(0)[:, before:]
        z = self.tokens(input_ids) + self.positions(positions)
        states = [z]
        for block in self.blocks:
            z = block(z, real, cache)
            states.append(z)
        x = self.norm(z)
        logits = F.linear(x, self.tokens.weight)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        hidden = (*states, x) if output_hidden_states else None
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=hidden, **{CACHE: cache}
        )
