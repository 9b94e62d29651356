"""`rt.Classifier` and `rt.Regressor` as estimators: scikit-learn's own checks, and what it cannot know of items."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from joblib import parallel_backend
from PIL import Image
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import parametrize_with_checks

import restuning as rt
from restuning.cli.main import main
from restuning.errors import CheckpointError, DataError, RestuningError
from restuning.methods.named import TRIED
from restuning.runs import estimator as base

FAILED: dict[str, str] = {}
"""scikit-learn's checks that are expected to fail, and why: none. (`check_array_api_input` is skipped by itself where
SCIPY_ARRAY_API is not set.)"""


@parametrize_with_checks(
    [rt.Classifier(lr=0.3, epochs=8), rt.Regressor(lr=0.3, epochs=8)], expected_failed_checks=lambda estimator: FAILED
)
def test_scikit_learns_own_checks(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.fixture(scope="module")
def pictures() -> tuple[list[Image.Image], np.ndarray[Any, Any]]:
    """30 bright or dark pictures with noise, 24 pixels a side."""
    random = np.random.default_rng(0)
    bright = np.arange(30) % 2
    pixels = (60 + 130 * bright[:, None, None, None] + random.integers(0, 50, (30, 24, 24, 3))).astype(np.uint8)
    return [Image.fromarray(p) for p in pixels], np.array(["dark", "light"])[bright]


@pytest.mark.parametrize("method", ["linear", "bypass"])
def test_a_rate_that_is_not_given_is_one_of_three_and_trains_as_if_it_were(pictures: Any, method: str) -> None:
    X, y = [*pictures[0]] * 4, np.tile(pictures[1], 4)
    found = rt.Classifier(method=method, epochs=2).fit(X, y)
    assert found.lr is None and found.lr_ in TRIED
    given = rt.Classifier(method=method, epochs=2, lr=found.lr_).fit(X, y)
    assert np.array_equal(found.predict_proba(X), given.predict_proba(X))
    assert rt.Classifier(method=method, epochs=1).fit(X[:30], y[:30]).lr_ == TRIED[0], "too few to hold some out"


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many items went through the backbone, pass by pass; nothing is known of earlier ones."""
    base.CACHE.clear()
    base._BACKBONES.clear()
    seen: list[int] = []
    load = base.load_backbone

    def counted(*args: Any) -> Any:
        module = load(*args)
        module.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(len([*args, *kwargs.values()][0])), with_kwargs=True
        )
        return module

    monkeypatch.setattr(base, "load_backbone", counted)
    return seen


def test_a_search_over_methods_and_rates_takes_one_pass(
    pictures: tuple[list[Image.Image], Any], passed: list[int]
) -> None:
    X, y = pictures
    grid = {"method": ["linear", "bypass"], "lr": [0.03, 0.01]}
    search = GridSearchCV(rt.Classifier(epochs=4), grid, cv=3).fit(X, y)
    assert sum(passed) == len(X)
    assert search.best_score_ > 0.9 and (search.predict(X) == y).mean() > 0.9
    scores = cross_val_score(
        Pipeline([("as-they-are", FunctionTransformer()), ("tuned", search.best_estimator_)]), X, y
    )
    assert scores.shape == (5,) and sum(passed) == len(X)
    assert (clone(search.best_estimator_).fit(X, y).predict_proba(X) >= 0).all() and sum(passed) == len(X)


def test_paths_images_and_arrays_are_the_same_items(
    pictures: tuple[list[Image.Image], Any], tmp_path: Path, passed: list[int]
) -> None:
    X, y = pictures
    tuned = rt.Classifier(epochs=2).fit(X, y)
    expected = tuned.predict_proba(X[:4])
    for i, image in enumerate(X[:4]):
        image.save(tmp_path / f"{i}.png")
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for same in (paths, [str(p) for p in paths], np.stack([np.asarray(x) for x in X[:4]])):
        assert np.allclose(tuned.predict_proba(same), expected, atol=1e-6)
    assert sum(passed) == len(X) + 4 + 4  # a file, and pixels, are told by their own bytes
    with pytest.raises(DataError, match="rows of numbers"):
        tuned.predict(np.zeros((2, 3)))
    with pytest.raises(DataError, match=r"expected paths, PIL images"):
        tuned.predict([X[0], 3])


def test_what_it_saves_is_what_predict_reads(
    pictures: tuple[list[Image.Image], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    X, y = pictures
    tuned = rt.Classifier(method="linear", epochs=4).fit(X, y)
    tuned.save(tmp_path / "tuned")
    X[0].save(tmp_path / "picture.png")
    assert main(["predict", str(tmp_path / "tuned"), str(tmp_path / "picture.png"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    row = printed[0] if isinstance(printed, list) else printed
    best = (row.get("top") or row["results"][0]["top"])[0]
    assert best["class"] == tuned.predict(X[:1])[0]
    assert best["probability"] == pytest.approx(tuned.predict_proba(X[:1]).max(), abs=1e-4)
    for again in (rt.Classifier.load(tmp_path / "tuned"), pickle.loads(pickle.dumps(tuned))):
        assert np.array_equal(again.predict_proba(X), tuned.predict_proba(X))
        assert again.get_params() == tuned.get_params()
    with pytest.raises(CheckpointError, match="Regressor is for regression"):
        rt.Regressor.load(tmp_path / "tuned")
    with pytest.raises(RestuningError, match="no backbone"):
        rt.Classifier(epochs=1).fit(np.eye(4), [0, 1, 0, 1]).save(tmp_path / "rows")


def test_partial_fit_adds_classes_and_forgets_none(pictures: tuple[list[Image.Image], Any], passed: list[int]) -> None:
    X, y = pictures
    blue = [Image.new("RGB", (24, 24), (0, 0, 200 + i)) for i in range(10)]
    tuned = rt.Classifier(epochs=6).fit(X, y)
    head = tuned.model_.adapter("default").head.weight.detach().clone()
    tuned.epochs = 1
    tuned.partial_fit(blue, ["blue"] * 10)
    assert tuned.classes_.tolist() == ["blue", "dark", "light"]
    grown = tuned.model_.adapter("default").head.weight
    assert grown.shape[0] == 3 and (grown[1:] - head).abs().max() < (head - grown[:1]).abs().max()
    tuned.set_params(epochs=6).partial_fit(blue, ["blue"] * 10)
    assert tuned.score([*X, *blue], [*y, *["blue"] * 10]) > 0.9
    assert sum(passed) == len(X) + len(blue)


def test_a_loaded_classifier_forgets_nothing(
    pictures: tuple[list[Image.Image], Any], tmp_path: Path, passed: list[int]
) -> None:
    """Saved with what it has seen, it goes on as the one that was never saved does; without, it refuses to forget."""
    X, y = pictures
    blue = [Image.new("RGB", (24, 24), (0, 0, 200 + i)) for i in range(10)]
    tuned = rt.Classifier(epochs=4).fit(X, y)
    tuned.save(tmp_path / "seen", seen=True)
    tuned.save(tmp_path / "alone")
    loaded = rt.Classifier.load(tmp_path / "seen")
    loaded.save(tmp_path / "again", seen=True)
    for one in (tuned, loaded, again := rt.Classifier.load(tmp_path / "again")):
        one.partial_fit(blue[:5], ["blue"] * 5).partial_fit(blue[5:], ["blue"] * 5)
    assert sum(passed) == len(X) + len(blue)
    assert np.array_equal(loaded.predict_proba([*X, *blue]), tuned.predict_proba([*X, *blue]))
    assert np.array_equal(again.predict_proba(X), tuned.predict_proba(X))
    assert not (tmp_path / "alone/seen.safetensors").exists()
    alone = rt.Classifier.load(tmp_path / "alone")
    with pytest.raises(DataError, match="no items of 'dark', 'light'"):
        alone.partial_fit(blue, ["blue"] * 10)
    alone.partial_fit([*X, *blue], [*y, *["blue"] * 10])
    with pytest.raises(RestuningError, match="inside it"):
        rt.Classifier(method="lora", epochs=1).fit(X[:4], y[:4]).save(tmp_path / "inside", seen=True)
    for damage in (b"", (tmp_path / "seen/adapter_model.safetensors").read_bytes()):
        (tmp_path / "seen/seen.safetensors").write_bytes(damage)
        with pytest.raises(CheckpointError, match="damaged, or of another adapter"):
            rt.Classifier.load(tmp_path / "seen")


def test_threads_train_as_one_does(pictures: tuple[list[Image.Image], Any], passed: list[int]) -> None:
    X, y = pictures
    grid = {"method": ["linear", "bypass", rt.Residual({"ffn": rt.Adapter(2)})], "lr": [0.03, 0.01]}
    found = []
    for workers in (1, 4):
        base.CACHE.clear()
        with parallel_backend("threading"):
            search = GridSearchCV(rt.Classifier(epochs=1, image_size=16), grid, cv=2, n_jobs=workers, refit=False)
            found.append(search.fit(X, y).cv_results_["mean_test_score"])
    assert np.array_equal(*found)


def test_a_method_inside_the_backbone_learns_too(pictures: tuple[list[Image.Image], Any]) -> None:
    X, y = pictures
    tuned = rt.Classifier(method=rt.Residual({"ffn": rt.Adapter(4)}), epochs=1, image_size=32).fit(X[:8], y[:8])
    adapter = tuned.model_.adapter("default")
    assert any(p.abs().max() > 0 for name, p in adapter.named_parameters() if "up" in name)
    assert set(tuned.predict(X[:8])) <= {"dark", "light"}


def test_a_regressor_learns_a_target_far_from_zero(pictures: tuple[list[Image.Image], Any], tmp_path: Path) -> None:
    X, y = pictures
    target = 1000 + 50.0 * (y == "light")
    tuned = rt.Regressor(epochs=20).fit(X, target)
    assert tuned.score(X, target) > 0.5
    tuned.save(tmp_path, seen=True)
    loaded = rt.Regressor.load(tmp_path)
    assert np.allclose(loaded.predict(X), tuned.predict(X))
    for one in (tuned, loaded):
        one.set_params(epochs=2).partial_fit(X[:4], target[:4] + 100)
    assert np.allclose(loaded.predict(X), tuned.predict(X))


def test_texts(passed: list[int]) -> None:
    X = ["a fine film", "what a joy", "a great story", "dull and slow", "a bad film", "what a bore"]
    y = [1, 1, 1, 0, 0, 0]
    tuned = rt.Classifier("all-MiniLM-L6-v2", "linear", epochs=20, lr=0.03).fit(X, y)
    assert tuned.score(X, y) == 1.0
    passes = len(passed)
    assert cross_val_score(tuned, X, y, cv=3).shape == (3,) and len(passed) == passes
    with pytest.raises(DataError, match="empty"):
        tuned.predict(["  "])


def test_without_scikit_learn_the_line_to_install_it_is_named() -> None:
    code = """
import sys
sys.modules["sklearn"] = None
import restuning as rt
try:
    rt.Classifier
except rt.RestuningError as error:
    print(error)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install 'restuning[images]'" in printed and printed.count("\n") == 1
