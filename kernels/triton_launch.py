"""What all Triton kernels of this folder share: launch, tiles, loads and roundings.

The functions of triton_norms.py, triton_heads.py and triton_steps.py take and return what the plain
forms of the same names do, in mmdit.py, qwen_vl.py, flow_grpo.py and parts/ops.py; each has its
gradient. Memory and not arithmetic limits them, so a kernel reads and writes everything once:

- float32 inside; float32, bfloat16 or float16 outside. A result is rounded where the plain form
  rounds it, if that is cheap, else only once, at the end. Gradients are rounded once.
- The backward pass computes a row's statistics again from the row, which it reads anyway, so
  nothing but inputs is kept for it.
- A sum over rows has two stages: a program sums its rows into a buffer `partial`, and torch sums
  the buffer. ROWS is the number of rows, tokens or heads that one program computes.
- Sums whose gradient nobody asks for, as those of a frozen norm, are not formed.

Letters: B batch, L tokens, N rows (all leading dimensions as one), H heads, K key-value heads,
E channels of one head, D width, M width of the MLP, V vocabulary entries of a tile. The bytes that
each kernel moves are counted by bench/kernel_table.py.
"""

import functools

import torch
import triton
import triton.language as tl

# A row is held in registers: 16 values for each of at most 512 threads.
WIDEST = 8192


def launch(kernel, grid, *args, num_warps=4, **constants):
    """Run `kernel` on the device of its first argument; a grid without programs is no launch."""
    if any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in args):
        raise TypeError("the Triton kernels compute in float32; float64 is for the plain forms")
    if 0 not in grid:
        # Triton launches on the current device, which need not be that of the tensors.
        with torch.cuda.device_of(args[0]):
            # A fused a·b + c would not round the product, as the plain form does.
            kernel[grid](*args, num_warps=num_warps, enable_fp_fusion=False, **constants)


def row_block(width):
    """The launch's settings for a program that holds a whole row."""
    if width > WIDEST:
        raise ValueError(f"rows of at most {WIDEST} values, got {width}")
    block = triton.next_power_of_2(width)
    # With 16 values a thread, what a gradient holds at once fits the registers and nothing spills.
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def unit_stride(x):
    """x itself if its last dimension lies without gaps, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def promoted(*tensors):
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors))


def check(name, x, shape):
    if x.shape != torch.Size(shape):  # a kernel would read past the tensor's end
        raise ValueError(f"{name} must have the shape {list(shape)}, got {list(x.shape)}")


@triton.jit
def load(pointers, inside):
    """Values in float32; 0 where `inside` is false, which no sum of values or squares sees."""
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def rounded(x, like):
    """x as a tensor of the type behind the pointer `like` would hold it, again in float32."""
    return x.to(like.dtype.element_ty).to(tl.float32)
