"""Forms of operations that a CPU computes faster than the plain ones, in torch itself.

Shapes: B batch, L tokens, D width, H heads, E channels of one head.
"""

import torch
import torch.nn.functional as F


def modulate(x, shift, scale, eps=1e-6):
    if x[0].numel() < 2**17:  # so small that calls cost more than passes over memory
        normed = F.layer_norm(x, x.shape[-1:], eps=eps)
        return torch.addcmul(shift[:, None], normed, 1 + scale[:, None])
    # A LayerNorm with its own affine part for each picture reads and writes the tokens once.
    pictures = []
    for tokens, weight, bias in zip(x, 1 + scale, shift, strict=True):
        pictures.append(F.layer_norm(tokens, x.shape[-1:], weight, bias, eps))
    return torch.stack(pictures) if len(pictures) > 1 else pictures[0][None]


def gate_residual(x, branch, gate):
    return torch.addcmul(x, gate[:, None], branch)


def gelu_linear(x, layer):
    """In one pass where `kernels.linears` has laid out the layer's weight, else not at all."""
    product = vars(layer).get("forward")
    return NotImplemented if product is None else product(x, gelu=True)


def rms_norm(x, weight, eps=1e-6):
    if x.dtype != torch.float32:
        return NotImplemented
    # vector_norm reads x once; x.pow(2).mean() also writes a temporary as large as x.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    y = x * (norm * norm).div_(x.shape[-1]).add_(eps).rsqrt_()
    needs_gradient = weight.requires_grad and torch.is_grad_enabled()
    return y * weight if needs_gradient else y.mul_(weight)


def rotate(x, cos, sin):
    if torch.is_grad_enabled():
        return NotImplemented  # autograd would copy what is changed in place
    first, second = x.chunk(2, dim=-1)
    sin_first, sin_second = sin.chunk(2, dim=-1)
    y = x * cos
    y[..., :first.shape[-1]].addcmul_(second, sin_first, value=-1)
    y[..., first.shape[-1]:].addcmul_(first, sin_second)
    return y


def channels_last(x):
    """Every convolution that follows keeps the layout."""
    return x.contiguous(memory_format=torch.channels_last)
