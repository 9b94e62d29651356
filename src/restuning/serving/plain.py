"""What a server is without this library: an endpoint of one fully tuned model a task, for `restuning bench serve`."""

import sys
from typing import Any

import torch
from torch import nn

from restuning.backbones.load import load_backbone, preprocessing_of


def main(port: str, name: str, weights: str, classes: str, image_size: str | None = None) -> None:
    """Listen on loopback. The models are one in memory, run once for each task: what would be a model
    of its own costs the same time, and would not fit here a hundred times."""
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.concurrency import run_in_threadpool

    from restuning.data.decode import decode

    size = None if image_size is None else int(image_size)
    backbone = load_backbone(name, weights, size)
    how = preprocessing_of(backbone, size)
    with torch.inference_mode():
        width = backbone(torch.zeros(1, 3, *how.size)).shape[-1]
    head, app = nn.Linear(width, int(classes)), FastAPI()

    def answer(body: bytes, models: int) -> list[dict[str, Any]]:
        from io import BytesIO

        with torch.inference_mode():
            x = how(decode(BytesIO(body), "the image"))[None]
            found = []
            for _ in range(models):
                best = head(backbone(x)).softmax(-1).max(-1)
                found.append({"class": int(best.indices), "probability": round(float(best.values), 6)})
        return found

    @app.post("/predict")
    async def predict(request: Request, models: int = 1) -> Any:
        return await run_in_threadpool(answer, await request.body(), models)

    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning", access_log=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
