"""How the scripts run a network: the same masks, sooner.

    net = on(device, net)          CPU: channels last. GPU: fused kernels
    keep_memory()                  CPU: for many passes without gradients
    net = Replayed(net)            GPU: calls are recorded and replayed, for a batch too small to keep the launching Python ahead
    net = Recomputed(net)          trains in 0.55 of the memory, for 1.3 times the time

results/README.md has what they gain on a CPU, and `python bench.py` measures it; on a GPU nobody has yet.
"""

import ctypes
from collections import OrderedDict

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gates_triton import fuse


def on(device, net):
    """The network on its device, in the form meant to give masks fastest there; parameters keep their names and shapes."""
    if device.type == "cuda":
        return fuse(net.to(device))
    return net.to(device, memory_format=torch.channels_last)  # oneDNN's convolutions are made for it


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

    The first call of a shape runs as it is, the second is recorded, as photos of one size seldom come alone; where memory is short for
    that, calls run as they are. Results are the caller's own. The weights may be changed in place, not replaced.
    """

    def __init__(self, f, most=8):
        self.f, self.most, self.graphs, self.pool = f, most, OrderedDict(), None

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
                self.graphs[key] = self.record(args)
        if self.graphs[key] is None:
            return self.f(*args)
        graph, inputs, results = self.graphs[key]
        for still, x in zip(inputs, tensors):
            still.copy_(x)
        graph.replay()
        return cloned(results)

    def record(self, args):
        """A graph of f(*args), the tensors that it reads from, and what it writes to; None where memory is short."""
        try:
            with torch.inference_mode(False):  # whose tensors could not be written to outside of it
                args = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(2):  # what must not happen while recording: kernels compile, cuDNN chooses
                    self.f(*args)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            self.pool = self.pool or torch.cuda.graph_pool_handle()  # one for all, as they never run at the same time
            with torch.cuda.graph(graph, pool=self.pool):
                results = self.f(*args)
        except torch.OutOfMemoryError:
            return None
        return graph, [x for x in args if isinstance(x, torch.Tensor)], results


def cloned(results):
    return results.clone() if isinstance(results, torch.Tensor) else type(results)(map(cloned, results))
