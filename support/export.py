"""The network as ONNX, for any batch and size."""

import warnings

import onnxruntime
import torch

from support.pictures import MEAN, STD


class FromRGB(torch.nn.Module):
    """RGB from 0 to 1 (B, 3, h, w) at the working size -> the logits (B, K, h, w) of the last pass."""

    def __init__(self, model):
        super().__init__()
        self.model = model  # normalised image -> logits of every pass

    def forward(self, image):
        mean, std = (torch.from_numpy(values)[:, None, None] for values in (MEAN, STD))
        return self.model((image - mean) / std)[-1]


def to_onnx(net, image, path):
    """Trace `net` into a file. The newer exporter (dynamo=True) would fix which poolings meet an odd size."""
    sizes = {name: {0: "batch", 2: "height", 3: "width"} for name in ("image", "logits")}
    how = dict(dynamo=False, opset_version=18, input_names=["image"], output_names=["logits"], dynamic_axes=sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rurnet's checks are not traced, and this exporter is the older one
        torch.onnx.export(net, (image,), path, **how)


@torch.no_grad()
def export(model, path):
    """Write the file if ONNX Runtime returns PyTorch's logits at unseen sizes; return the largest difference."""
    net, part, differences = FromRGB(model).eval(), path.with_name(path.name + ".part"), []
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"--export {path}: must name a file in a folder that exists")
    try:
        to_onnx(net, torch.rand(1, 3, 97, 131), part)
        session = onnxruntime.InferenceSession(part)
        for shape in (1, 3, 96, 128), (2, 3, 59, 102):
            image = torch.rand(shape)
            got, want = torch.from_numpy(session.run(None, {"image": image.numpy()})[0]), net(image)
            differences.append(((got - want).abs().max() / (1 + want.abs().max())).item())
            if not differences[-1] < 1e-3:  # true where it is not a number
                raise ValueError(f"ONNX Runtime's logits differ from PyTorch's by {differences[-1]:.1e} of the largest")
        part.replace(path)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise ValueError(f"{path}: not written; {(str(error).splitlines() or ['?'])[0]}") from None
    finally:
        part.unlink(missing_ok=True)
    return max(differences)
