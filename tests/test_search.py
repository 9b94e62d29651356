"""NOAH: slim tuners, the space of subnets, and a search from beginning to end."""

import json
import random
from pathlib import Path

import pytest
import torch
from tiny import TINY

import restuning as rt
from restuning.cli.main import main
from restuning.errors import MethodError
from restuning.methods.files import from_dict, to_dict
from restuning.runs.search import KINDS, Space, Supernet, to_method

COSTS = {kind: {0: 0, 1: 11, 5: 55, 10: 110} for kind in KINDS}


def supernet(limit: int = 10_000) -> Supernet:
    net = Supernet(TINY["timm-vit"].backbone(), (1, 5, 10), limit, 0, num_classes=3)
    with torch.no_grad():
        for p in net.tuned.adapters.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.eval()


def test_a_subnet_is_the_method_that_it_names() -> None:
    """The supernet at a subnet equals that subnet, built as an ordinary method with the weights cut to size."""
    net, rng = supernet(), random.Random(0)
    inputs = TINY["timm-vit"].inputs()
    for _ in range(8):
        subnet = net.space.any(rng)
        net.use(subnet)
        alone = rt.adapt(TINY["timm-vit"].backbone(), to_method(subnet), 3).eval()
        assert rt.count(alone)["tuners"] == net.space.parameters(subnet)
        adapter, whole = alone.adapters["default"], net.tuned.adapters["default"]
        for place, tuner in adapter.tuners.items():
            for name, p in tuner.named_parameters():
                big = whole.tuners[place].whole.get_parameter(name)
                p.data = big.data[tuple(slice(s) for s in p.shape)].clone()
        adapter.head.load_state_dict(whole.head.state_dict())
        torch.testing.assert_close(net(inputs["x"]), alone(**inputs))


def test_every_subnet_keeps_the_limit_and_the_space() -> None:
    rng, space = random.Random(1), Space(12, COSTS, 700)
    parents = [space.within(space.any(rng), rng) for _ in range(40)]
    children = [space.crossed(*rng.sample(parents, 2), rng) for _ in range(40)]
    children += [space.mutated(p, rng, 0.3) for p in parents]
    assert space.depths == (3, 6, 9, 12)
    for subnet in parents + children:
        assert 99 <= space.parameters(subnet) <= 700
        for dims in subnet.values():
            used = sum(map(bool, dims))
            assert used in space.depths and all(dims[:used]) and not any(dims[used:]) and set(dims) <= {0, 1, 5, 10}
    assert len({json.dumps(s) for s in children}) > 40, "it looks around"


def test_a_limit_below_the_smallest_subnet() -> None:
    assert Space(12, COSTS, 99).parameters(Space(12, COSTS, 99).extreme(0)) == 99
    with pytest.raises(MethodError, match="limit 98: the smallest subnet has 99 parameters"):
        Space(12, COSTS, 98)


def test_training_walks_by_the_sandwich_rule() -> None:
    net, seen = supernet().train(), []
    for _ in range(8):
        net(TINY["timm-vit"].inputs()["x"])
        seen.append(sum(slim.size for blocks in net.slims.values() for slims in blocks for slim in slims))
    largest, smallest = 3 * 2 * 10, 3 * 1 * 1
    assert [s == largest for s in seen[::4]] == [True, True] and [s == smallest for s in seen[1::4]] == [True, True]
    assert all(smallest <= s <= largest for s in seen) and len(set(seen)) > 2
    assert int(net.calls) == 8 and "calls" in net.state_dict()


def test_a_search_ends_in_a_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", "digits", "--train-size", "120", "--test-size", "40"]
    out = tmp_path / "search"
    small = ["--population", "4", "--generations", "1", "--epochs", "1", "--lr", "0.005", "--limit", "60000"]
    assert main(["search", *data, "--val-size", "40", *small, "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    again = ["search", *data, "--val-size", "40", *small, "--out", str(out)]
    assert main(again) == 2 and "holds a finished run" in capsys.readouterr().err
    assert main([*again, "--limit", "50000", "--resume"]) == 2 and "other settings" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(out)]) == 2 and "unknown settings" in capsys.readouterr().err
    assert found["parameters"] <= 60_000 and len(found["best_by_generation"]) == 2
    assert found["best_by_generation"] == sorted(found["best_by_generation"])
    method = from_dict(json.loads((out / "method.json").read_text()))
    assert isinstance(method, rt.Mix) and method == to_method(found["subnet"])
    run = ["train", *data, "--method", str(out / "method.json"), "--epochs", "1", "--quiet", "--out"]
    assert main([*run, str(tmp_path / "run")]) == 0
    tuned = rt.Tuned.from_pretrained(rt.load_backbone("restuning-micro"), tmp_path / "run")
    assert rt.count(tuned)["tuners"] == found["parameters"]
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())
    assert recorded["method"] == to_dict(method)
    capsys.readouterr()
    assert main(["search", *data, "--val-size", "40", *small, "--limit", "9", "--out", str(tmp_path / "none")]) == 2
    assert "limit 9: the smallest subnet has" in capsys.readouterr().err and not (tmp_path / "none").exists()
