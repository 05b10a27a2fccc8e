"""How the scripts run a network: the same masks, faster or in less memory; experiments/bench.py measures it."""

import ctypes
import sys
from collections import OrderedDict
from contextlib import nullcontext, suppress

import torch
from torch import distributed, nn
from torch.utils._pytree import tree_leaves, tree_map

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


def replayed(net, device):
    return ReplayedNet(net) if device.type == "cuda" else net


class ReplayedNet(nn.Module):
    """On a GPU a network as recordings, called as before: net(image, passes), net.start, net.step."""

    def __init__(self, net):
        super().__init__()
        self.net, self.forward = net, Replayed(net)
        if hasattr(net, "step"):
            self.start, self.step = net.start, Replayed(net.step)


class Replayed:
    """f(*args) for inference on a GPU from CUDA graphs: a recording of its kernels for each shape of its tensors.

    The first call of a shape runs eagerly, the second is recorded: a shape seen once is not worth it.
    What cannot be recorded runs eagerly. Results belong to the caller. Weights may change in place.
    """

    def __init__(self, f, most=8):
        self.f, self.most, self.graphs, self.pool = f, most, OrderedDict(), None

    @torch.no_grad()
    def __call__(self, *args):
        return (self.recording_of(args) or self.f)(*args)

    def recording_of(self, args):
        half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        about = lambda x: (x.shape, x.dtype, x.stride()) if isinstance(x, torch.Tensor) else x
        key = half, *map(about, tree_leaves(args))
        seen, recording = key in self.graphs, self.graphs.pop(key, None)
        if seen and recording is None:
            stream = torch.cuda.current_stream()
            try:
                recording = self.record(args)
            except RuntimeError as error:  # memory is too short, or an operator cannot be recorded
                print(f"runs without a CUDA graph: {(str(error).splitlines() or ['?'])[0]}", file=sys.stderr)
                torch.cuda.set_stream(stream)
                recording = False  # so that no later call tries again
            torch.clear_autocast_cache()  # its half-precision weights may lie in the recording's memory
        self.graphs[key] = recording  # the latest call stands last
        if len(self.graphs) > self.most:
            self.graphs.popitem(last=False)
        return recording

    def record(self, args):
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
        torch.clear_autocast_cache()  # so that the recording casts the weights itself, once
        with torch.cuda.graph(graph, pool=self.pool):
            results = self.f(*args)

        def replay(*new):
            for kept, x in zip(tree_leaves(args), tree_leaves(new)):
                if isinstance(x, torch.Tensor):
                    kept.copy_(x)
            graph.replay()
            return tree_map(torch.clone, results)

        return replay


class Graphed(nn.Module):
    """Trains from two CUDA graphs, of forward and of backward; the loss, its check and the optimiser stay outside.
    On CPUs, of several processes, and where a batch norm would notice the recording, the network runs as it is."""

    def __init__(self, net):
        super().__init__()
        self.net, self.graphs = net, TrainingGraphs(net)
        self.wanted = next(net.parameters()).is_cuda and not list(net.buffers())

    def forward(self, image, passes):
        wanted = self.wanted and not distributed.is_initialized()
        return ((self.graphs.recording_of((image, passes)) if wanted else None) or self.net)(image, passes)


class TrainingGraphs(Replayed):
    def record(self, args):
        image, passes = args
        bound = nn.ModuleList([self.f])  # has the parameters, which PyTorch looks for
        bound.forward = lambda image: tuple(self.f(image, passes))
        half = dict(dtype=torch.get_autocast_dtype("cuda"), enabled=torch.is_autocast_enabled("cuda"))
        with torch.autocast("cuda", cache_enabled=False, **half):  # PyTorch refuses to record with that cache
            graphed = torch.cuda.make_graphed_callables(bound, (torch.rand_like(image),))
        return lambda image, passes: list(graphed(image))
