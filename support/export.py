"""The network as ONNX, for any batch and size. Its metadata says the short side and the number of classes."""

import io
import warnings

import onnx
import onnxruntime
import torch

from support.checkpoints import first_line, new_file
from support.pictures import MEAN, STD


class FromRGB(torch.nn.Module):
    """RGB from 0 to 1 (B, 3, h, w) at the working size -> the logits (B, K, h, w) of the last pass."""

    def __init__(self, model):
        super().__init__()
        self.model = model  # normalised image -> logits of every pass

    def forward(self, image):
        mean, std = (torch.from_numpy(values)[:, None, None] for values in (MEAN, STD))
        return self.model((image - mean) / std)[-1]


def to_onnx(net, image, file):
    """Trace `net` into a file. The newer exporter (dynamo=True) would fix which poolings meet an odd size."""
    sizes = {name: {0: "batch", 2: "height", 3: "width"} for name in ("image", "logits")}
    how = dict(dynamo=False, opset_version=18, input_names=["image"], output_names=["logits"], dynamic_axes=sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rurnet's checks are not traced, and this exporter is the older one
        torch.onnx.export(net, (image,), file, **how)


@torch.no_grad()
def export(model, path, producer="rurnet"):
    """Write the file if ONNX Runtime returns PyTorch's logits at unseen sizes; return the largest difference."""
    net, content, differences = FromRGB(model).eval(), io.BytesIO(), []
    try:
        to_onnx(net, torch.rand(1, 3, 97, 131), content)
        session = onnxruntime.InferenceSession(content.getvalue())
        for shape in (1, 3, 96, 128), (2, 3, 59, 102):
            image = torch.rand(shape)
            got, want = torch.from_numpy(session.run(None, {"image": image.numpy()})[0]), net(image)
            differences.append(((got - want).abs().max() / (1 + want.abs().max())).item())
            if not differences[-1] < 1e-3:  # true where it is not a number
                raise ValueError(f"ONNX Runtime's logits differ from PyTorch's by {differences[-1]:.1e} of the largest")
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise ValueError(f"{path}: not written; {first_line(error)}") from None
    onnx_model = onnx.load_from_string(content.getvalue())
    onnx_model.producer_name = producer
    onnx.helper.set_model_props(onnx_model, {"short_side": str(model.size), "classes": str(model.classes)})
    with new_file(path) as file:
        file.write(onnx_model.SerializeToString())
    return max(differences)
