"""Our sequential and parallel adapters against the `adapters` package, with copied weights, on BERT and ViT.

It needs an older transformers than the rest, so it runs in an environment of its own:

pip install -e . adapters torch timm && python scripts/check_adapters.py

Prints the largest relative difference of outputs and of gradients for each; exits with 1 if any is above 1e-5.
"""

import copy
import sys
from dataclasses import replace
from typing import Any

import adapters
import torch
import transformers

import restuning as rt

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
BERT = transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=50, max_position_embeddings=40))
VIT = transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=16, patch_size=8))
PIXELS, WORDS = {"pixel_values": torch.randn(3, 3, 16, 16)}, {"input_ids": torch.randint(3, 50, (3, 7))}
WIDTH = 8
CONFIGS = {
    "Houlsby": (
        adapters.DoubleSeqBnConfig(reduction_factor=32 / WIDTH, non_linearity="gelu"),
        rt.Residual(dict.fromkeys(("mha", "ffn"), rt.Adapter(WIDTH, init="bert", source="out"))),
    ),
    "Pfeiffer, without the first norm": (
        adapters.SeqBnConfig(reduction_factor=32 / WIDTH, original_ln_before=False),
        rt.Residual({"ffn": rt.Adapter(WIDTH, act="relu", init="bert", source="out")}),
    ),
    "parallel (MAM)": (
        adapters.ParBnConfig(reduction_factor=32 / WIDTH),
        rt.Residual({"ffn": rt.Adapter(WIDTH, act="relu", init="bert", factor=4.0)}),
    ),
}


def main() -> int:
    worst = 0.0
    for name, backbone, inputs in (("BERT", BERT, WORDS), ("ViT", VIT, PIXELS)):
        for kind, (config, method) in CONFIGS.items():
            if (name, kind) == ("ViT", "parallel (MAM)"):  # there it reads the stream before its norm
                method = rt.Residual({"ffn": replace(method.tuners["ffn"], source="stream")})
            ours = rt.adapt(copy.deepcopy(backbone), method, None, pool="none").eval()
            theirs: Any = copy.deepcopy(backbone)
            adapters.init(theirs)
            theirs.add_adapter("a", config=config)
            theirs.train_adapter("a")
            theirs.eval()
            found = {k: p for k, p in theirs.named_parameters() if ".adapters.a." in k}
            pairs = []
            for place, tuner in ours.adapters["default"].tuners.items():
                block, op = place.split("_")
                here = {k: p for k, p in found.items() if f"layer.{block}." in k}
                mine = {k: p for k, p in here.items() if ("attention" in k) == (op == "mha")}
                assert len(mine) == 4, (name, kind, list(found))
                for key, p in tuner.named_parameters():
                    (q,) = (q for k, q in mine.items() if f"adapter_{key.split('.')[0]}." in k and k.endswith(key[-4:]))
                    p.data += 0.1 * torch.randn_like(p)
                    q.data.copy_(p.data)
                    pairs.append((p, q))
            a, b = ours(**inputs), theirs(**inputs).last_hidden_state
            (a**2).sum().backward()
            (b**2).sum().backward()
            assert gap(a, rt.adapt(copy.deepcopy(backbone), "linear", None, pool="none")(**inputs)) > 0.01, "it acts"
            differences = [gap(a, b), *(gap(p.grad, q.grad) for p, q in pairs)]
            worst = max(worst, *differences)
            print(f"{name}, {kind}: outputs {differences[0]:.1e}, gradients {max(differences[1:]):.1e}")
    return int(worst > 1e-5)


def gap(a: Any, b: Any) -> float:
    return float(((a - b).norm() / b.norm()).detach())


if __name__ == "__main__":
    sys.exit(main())
