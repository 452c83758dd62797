"""CUDA graphs: the launches of a function, recorded once and then made as one."""

import torch


def as_graph(function, *inputs):
    """`function` for CUDA tensors like `inputs` as a graph, see ops.as_graph.

    Results are copies, so that the next replay does not change them.
    """
    with torch.cuda.device(inputs[0].device):
        return record(function, *inputs)


def record(function, *inputs):
    held = [x.clone() for x in inputs]
    # The first call compiles kernels and makes workspaces, neither of which can be recorded.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function(*held)
    torch.cuda.current_stream().wait_stream(side)
    # Recording runs nothing on the GPU: the results are tensors that each replay fills.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function(*held)

    def replay(*inputs):
        # A graph reads the addresses it has recorded, so what is new is copied there.
        for mine, x in zip(held, inputs, strict=True):
            mine.copy_(x)
        graph.replay()
        return tuple(x.clone() for x in results)

    return replay
