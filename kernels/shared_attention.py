"""Attention of new tokens over a prompt that several rows share, whose keys are read once for all.

Shapes: P prompts, n rows of each, H heads, K key-value heads, G = H/K, E channels of one head,
L tokens of the prompt, t tokens of a row's own.
"""

import torch


def attend_shared(q, prompt_k, prompt_v, k, v, hidden=None):
    R, H, E = q.shape
    P, K, L, _ = prompt_k.shape
    n = R // P
    G = H // K
    q = q.view(P, n, K, G, E)
    # The queries of all rows of a prompt are one matrix against the prompt's keys.
    together = q.transpose(1, 2).reshape(P * K, n * G, E)
    over_prompt = batched(together, prompt_k.flatten(0, 1).mT).view(P, K, n, G, L).transpose(1, 2)
    over_own = batched(q.reshape(R * K, G, E), k.flatten(0, 1).mT).view(P, n, K, G, -1)
    scores = torch.cat([over_prompt, over_own], dim=-1).mul_(E ** -0.5)  # [P,n,K,G,L+t]
    if hidden is not None:
        scores.masked_fill_(hidden[:, None, None, None], float("-inf"))
    # The shares of all keys are normalised together, and only then read from two memories.
    to_prompt, to_own = scores.softmax(-1).to(q.dtype).tensor_split([L], dim=-1)
    to_prompt = to_prompt.transpose(1, 2).reshape(P * K, n * G, L)
    out = batched(to_prompt, prompt_v.flatten(0, 1)).view(P, K, n, G, E).transpose(1, 2)
    out = out + batched(to_own.reshape(R * K, G, -1), v.flatten(0, 1)).view(P, n, K, G, E)
    return out.to(q.dtype).reshape(R, H * E)


def batched(a, b):
    """a·b [N,·,·], not rounded below float32 where the device can do so."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a, b).to(torch.promote_types(a.dtype, torch.float32))
