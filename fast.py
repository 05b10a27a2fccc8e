"""How the scripts run a network: the same masks, sooner.

    net = on(device, net)          CPU: channels last. GPU: fused kernels
    keep_memory()                  CPU: for many passes without gradients
    net = Replayed(net)            GPU: calls are recorded and replayed, for a batch too small to keep the launching Python ahead
    net = Recomputed(net)          trains in less than half of the memory, for a third more time

What each gains is in README.md, and `python bench.py` measures it.
"""

import ctypes
from collections import OrderedDict

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gates_triton import fuse


def on(device, net):
    """The network on its device, in the form that is fastest there; parameters keep their names and shapes."""
    if device.type == "cuda":
        return fuse(net.to(device))
    return net.to(memory_format=torch.channels_last)  # oneDNN's convolutions are made for it


def keep_memory():
    """Let the C library keep the memory that tensors free. Left alone it hands large blocks back, and every pass over a photo
    asks for thousands of pages anew, which must be zeroed. Training gains nothing by it. This is glibc's (Linux); elsewhere nothing happens."""
    trim_threshold, mmap_threshold = -1, -3
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**30) or libc.mallopt(mmap_threshold, 2**25)  # what older ones allow
    except (AttributeError, OSError, TypeError):  # macOS, Windows
        pass


class Recomputed(nn.Module):
    """A recurrent network that remembers of every pass its state alone while training, and computes the rest again for the gradient."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, image, passes):
        state, masks = self.net.start(image), []
        for _ in range(passes):
            s, state = checkpoint(self.net.step, image, state, use_reentrant=False, preserve_rng_state=False)
            masks.append(s)
        return masks


class Replayed:
    """f(*args) for inference on a GPU, from CUDA graphs: a recording of its kernels for each shape of its tensors.

    The first call of a shape runs as it is, the second is recorded: a folder of photos that all differ loses nothing. Results are
    the caller's own. The weights may be changed in place, not replaced.
    """

    def __init__(self, f, most=8):
        self.f, self.most, self.graphs = f, most, OrderedDict()

    @torch.no_grad()
    def __call__(self, *args):
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = half, *((x.shape, x.dtype, x.stride()) if isinstance(x, torch.Tensor) else x for x in args)
        if key not in self.graphs:
            self.graphs[key] = None
            if len(self.graphs) > self.most:
                self.graphs.popitem(last=False)
            return self.f(*args)
        self.graphs.move_to_end(key)
        if self.graphs[key] is None:
            # autocast keeps half-precision copies of the weights until its context ends; a graph would outlive them
            with torch.autocast("cuda", half, enabled=half is not None, cache_enabled=False):
                self.graphs[key] = record(self.f, args)
        graph, inputs, results = self.graphs[key]
        for still, x in zip(inputs, tensors):
            still.copy_(x)
        graph.replay()
        return cloned(results)


def record(f, args):
    """A graph of f(*args), the tensors that it reads from, and what it writes to."""
    args = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):  # what must not happen while recording: kernels compile, cuDNN chooses
            f(*args)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = f(*args)
    return graph, [x for x in args if isinstance(x, torch.Tensor)], results


def cloned(results):
    return results.clone() if isinstance(results, torch.Tensor) else type(results)(map(cloned, results))
