"""Multi-token prediction: the losses of several depths over one head, in one call."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from cut_cross_entropy import linear_cross_entropy
from cut_cross_entropy.heads import Head, LowRank

V, D, DEPTHS, SHARE = 131, 32, 2, 0.3


SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 1 + DEPTHS,
    "num_attention_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


def deepseek():
    return transformers.DeepseekV3Config(
        **SIZES,
        num_key_value_heads=4,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ), transformers.DeepseekV3ForCausalLM


def glm():
    config = transformers.Glm4MoeConfig(**SIZES, num_key_value_heads=2, head_dim=8)
    return config, transformers.Glm4MoeForCausalLM


class MultiToken(nn.Module):
    """A model of transformers, which drops these layers, with its last layers as the depths.

    Depth k joins the states of depth k - 1 with the embeddings of the tokens k positions ahead
    (DeepSeek-V3, arXiv 2412.19437, section 2.2); all depths share the embeddings and the head.
    """

    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        config, cls = make()
        config._experts_implementation = "eager"  # grouped products have no float64
        self.model = cls(config).double().train()
        self.layers = self.model.model.layers[1:]
        self.model.model.layers = self.model.model.layers[:1]
        self.model.model.config.num_hidden_layers = 1
        self.norms = nn.ModuleList(
            nn.ModuleList(nn.RMSNorm(D, dtype=torch.float64) for _ in range(2))
            for _ in range(DEPTHS)
        )
        self.join = nn.ModuleList(
            nn.Linear(2 * D, D, bias=False, dtype=torch.float64) for _ in range(DEPTHS)
        )

    def forward(self, ids):
        """The states (1 + DEPTHS, B, T, D) that the head is applied to."""
        model = self.model.model
        hidden = model(input_ids=ids).last_hidden_state
        places = torch.arange(ids.shape[1])[None]
        rotary = model.rotary_emb(hidden, places)
        causal = torch.full((ids.shape[1],) * 2, -torch.inf, dtype=hidden.dtype).triu(1)
        states = [hidden]
        for k, (layer, norms, join) in enumerate(
            zip(self.layers, self.norms, self.join, strict=True), start=1
        ):
            ahead = model.embed_tokens(ids.roll(-k, 1))
            hidden = join(torch.cat([norms[0](hidden), norms[1](ahead)], -1))
            hidden = layer(
                hidden,
                attention_mask=causal[None, None],
                position_ids=places,
                position_embeddings=rotary,
            )
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            states.append(model.norm(hidden))
        return torch.stack(states)


def targets_of_depths(labels):
    """Depth k predicts the token k + 1 positions ahead: (1 + DEPTHS, B, T)."""
    ahead = [F.pad(labels[:, k + 1 :], (0, k + 1), value=-100) for k in range(1 + DEPTHS)]
    return torch.stack(ahead)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("make", [deepseek, glm])
def test_all_depths_in_one_call(make, adapted):
    model = MultiToken(make)
    ids = torch.randint(0, V, (2, 11), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :4] = -100
    states, weight = model(ids), model.model.lm_head.weight
    leaves = [p for p in model.parameters() if p.requires_grad]
    matrix, head = weight, weight
    if adapted:
        a, b = (torch.randn(x, dtype=torch.float64, requires_grad=True) for x in ((4, D), (V, 4)))
        matrix, head = weight + 0.1 * b @ a, Head(weight, low_rank=(LowRank(a, b, 0.1),))
        leaves += [a, b]
    targets = targets_of_depths(labels)
    shares = torch.tensor([1.0] + [SHARE / DEPTHS] * DEPTHS, dtype=torch.float64)
    expected = sum(
        share * F.cross_entropy(F.linear(e, matrix).flatten(0, 1), t.flatten())
        for share, e, t in zip(shares, states, targets, strict=True)
    )
    counts = (targets != -100).sum((1, 2))
    loss = linear_cross_entropy(
        states,
        head,
        targets,
        reduction="sum",
        token_weights=(shares / counts)[:, None, None],
        memory_budget=2**16,
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    ours = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad(expected, leaves, allow_unused=True)
    assert sum(x is not None for x in theirs) > 20
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)
