"""A peer of `restuning bench serve`: LitServe, with LoRA adapters of PEFT that share a batch by `adapter_names`."""

import base64
import sys
from io import BytesIO
from typing import Any

import litserve
import torch
from torch import nn

from restuning.backbones.load import load_backbone, preprocessing_of
from restuning.backbones.sites import find_sites
from restuning.bench.peers import lora_paths
from restuning.data.decode import decode


class Api(litserve.LitAPI):  # type: ignore[misc]
    """Every task of an image is a row of the batch."""

    def __init__(self, name: str, weights: str, classes: int, tasks: int, image_size: int | None, **batch: Any) -> None:
        super().__init__(**batch)
        self.given = name, weights, classes, tasks, image_size

    def setup(self, device: str) -> None:
        """Before the first request, in the process that computes."""
        import peft

        name, weights, classes, tasks, image_size = self.given
        backbone = load_backbone(name, weights, image_size)
        self.how, width = preprocessing_of(backbone, image_size), find_sites(backbone).info.out_features
        config = peft.LoraConfig(r=8, target_modules=lora_paths(backbone))
        self.model = peft.get_peft_model(backbone, config, adapter_name="t0")
        for i in range(1, tasks):
            self.model.add_adapter(f"t{i}", config)
        self.model.eval()
        self.heads = {f"t{i}": nn.Linear(width, classes) for i in range(tasks)}

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # an annotation would be one of its route
        """JSON with an image in base64 and names of tasks."""
        image = decode(BytesIO(base64.b64decode(request["image"])), "the image")
        return self.how(image), request["tasks"]

    def batch(self, inputs: list[Any]) -> Any:
        return inputs

    def predict(self, x: list[Any]) -> Any:
        names = [task for _, tasks in x for task in tasks]
        with torch.inference_mode():
            rows = torch.stack([pixels for pixels, tasks in x for _ in tasks])
            features = iter(self.model(rows, adapter_names=names))
            return [{task: self.heads[task](next(features)).softmax(-1).max(-1) for task in tasks} for _, tasks in x]

    def unbatch(self, output: Any) -> Any:
        return output

    def encode_response(self, output: Any) -> Any:
        return {
            task: {"class": int(best.indices), "probability": round(float(best.values), 6)}
            for task, best in output.items()
        }


def main(port: str, name: str, weights: str, classes: str, tasks: str, image_size: str | None = None) -> None:
    """Listen on loopback."""
    size = None if image_size is None else int(image_size)
    api = Api(name, weights, int(classes), int(tasks), size, max_batch_size=8, batch_timeout=0.002)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=120)
    server.run(host="127.0.0.1", port=int(port), num_api_servers=1, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main(*sys.argv[1:])
