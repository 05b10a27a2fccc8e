"""How the scripts run a network: the same masks, faster or in less memory; experiments/bench.py measures it."""

import ctypes
from collections import OrderedDict
from contextlib import nullcontext, suppress

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from gates_triton import fuse


def for_device(net, device):
    """The network on its device: fused kernels on a GPU, channels last on a CPU, whose convolutions prefer it."""
    return fuse(net.to(device)) if device.type == "cuda" else net.to(device, memory_format=torch.channels_last)


def autocast(device):
    """bfloat16 on a GPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def keep_memory():
    """Let glibc keep the memory that tensors free. By default it returns large blocks to the system, and every pass
    over a photo asks for thousands of zeroed pages again. Training gains nothing from this."""
    trim_threshold, mmap_threshold = -1, -3
    with suppress(AttributeError, OSError, TypeError):  # macOS, Windows
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**30) or libc.mallopt(mmap_threshold, 2**25)  # older ones refuse the first


class Recomputed(nn.Module):
    """Trains in 0.55 of the memory and 1.3 times the time: a pass keeps its state alone, the rest is computed twice."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, image, passes):
        state, masks = self.net.start(image), []
        for _ in range(passes):
            s, state = checkpoint(self.net.step, image, state, use_reentrant=False, preserve_rng_state=False)
            masks.append(s)
        return masks


class ReplayedNet(nn.Module):
    """On a GPU a network as recordings, called as before: net(image, passes), net.start, net.step."""

    def __init__(self, net):
        super().__init__()
        self.net, self.forward = net, Replayed(net)
        if hasattr(net, "step"):
            self.start, self.step = net.start, Replayed(net.step)


class Replayed:
    """f(*args) for inference on a GPU from CUDA graphs: a recording of its kernels for each shape of its tensors.

    The first call of a shape runs eagerly and the second is recorded, because photos of one size seldom come alone.
    Where memory is too short, calls run eagerly. Results belong to the caller. Weights may change in place.
    """

    def __init__(self, f, most=8):
        self.f, self.most, self.graphs, self.pool = f, most, OrderedDict(), None

    @torch.no_grad()
    def __call__(self, *args):
        half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        plain = [x for x in tree_leaves(args) if not isinstance(x, torch.Tensor)]
        key = half, *plain, *((x.shape, x.dtype, x.stride()) for x in tensors)
        if key in self.graphs and self.graphs[key] is None:
            # Autocast keeps half-precision copies of the weights until its context ends; a graph would outlive them.
            with torch.autocast("cuda", half, enabled=half is not None, cache_enabled=False):
                self.graphs[key] = self.record(args)
        self.graphs[key] = recorded = self.graphs.pop(key, None)  # the latest call stands last
        if len(self.graphs) > self.most:
            self.graphs.popitem(last=False)
        if recorded is None:
            return self.f(*args)
        graph, inputs, results = recorded
        for kept, x in zip(inputs, tensors):
            kept.copy_(x)
        graph.replay()
        return tree_map(torch.clone, results)

    def record(self, args):
        """A graph of f(*args), the tensors that it reads, and those that it writes; None where memory is too short."""
        try:
            with torch.inference_mode(False):  # tensors made inside inference mode could not be written to outside
                args = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, args)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):  # kernels compile and cuDNN chooses here, which must not happen while recording
                    self.f(*args)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            self.pool = self.pool or torch.cuda.graph_pool_handle()  # one for all, as they never run at the same time
            with torch.cuda.graph(graph, pool=self.pool):
                results = self.f(*args)
        except torch.OutOfMemoryError:
            return None
        return graph, [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)], results
