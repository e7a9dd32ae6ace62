"""The transformer for scikit-learn's pipelines: what it takes, that its descriptors are `embed`'s,
and what scikit-learn asks of an estimator.
"""

from __future__ import annotations

import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import check_estimator

import vggfeat
from vggfeat import LinearSVM, VggFeaturizer
from vggfeat.aggregate import POOLINGS
from vggfeat.errors import UnreadableImage, VggfeatError
from vggfeat.weights import save_weights

from ..conftest import Nets, assert_same_descriptors, photograph
from .conftest import NET, OTHER, Ours


@pytest.fixture
def paths(folder: Path) -> list[str]:
    """Twelve bluish images, then twelve reddish ones."""
    return [str(path) for path in sorted(folder.rglob("*.jpg"))]


LABELS = np.repeat(["blue", "red"], 12)


class Column:
    """What pandas' Series and DataFrame have in common, where pandas isn't there."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def to_numpy(self) -> np.ndarray:
        return self.values


# --- what it takes, and what it gives -------------------------------------------------------------


def test_descriptors_are_those_of_embed(paths: list[str]) -> None:
    network = vggfeat.load("mini")
    for settings in (
        {"scales": (96,)},
        {"scales": (96, 112), "pool": "stack", "mirror": False},
        {"layer": "pool5", "scales": [40, 64], "pool": "max"},
    ):
        ours = VggFeaturizer("mini", batch_size=4, workers=1, **settings).fit_transform(paths)
        expected = vggfeat.embed(network, paths, batch_size=4, workers=1, **settings)
        np.testing.assert_array_equal(ours, expected)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, rtol=1e-6)
    fitted = VggFeaturizer("mini").fit(paths)
    assert fitted.description_.scales == network.default_scales
    assert (fitted.description_.layer, fitted.n_features_out_) == ("fc7", network.dim("fc7"))


def test_a_column_comes_in_many_forms(paths: list[str]) -> None:
    paths = paths[:3]
    transformer = VggFeaturizer(NET, scales=(32,)).fit(paths)
    expected = transformer.transform(paths)
    objects = np.array([Path(path) for path in paths], dtype=object)
    files = [Path(path).read_bytes() for path in paths]
    pixels = [np.asarray(Image.open(path)) for path in paths]
    for X in (
        tuple(paths),
        [Path(path) for path in paths],
        [[path] for path in paths],
        np.array(paths),
        np.array(paths)[:, None],
        np.array(paths, dtype=np.dtypes.StringDType()),
        objects,
        objects[:, None],
        Column(np.array(paths, dtype=object)),
        Column(objects[:, None]),
        files,
        pixels,
        [Image.fromarray(each) for each in pixels],
    ):
        assert_same_descriptors(transformer.transform(X), expected)
    same = np.stack([photograph(i, 40, 50) for i in range(3)])
    assert_same_descriptors(transformer.transform(same), transformer.transform([*same]))


@pytest.mark.parametrize(
    ("X", "told"),
    [
        ([], "X is empty: there is nothing to describe"),
        ("a.jpg", r"X is 'a.jpg': give a list of images, and for one image \[image\]"),
        (photograph(0, 40, 50), "X is an array of shape .*: give a list of images"),
        (np.array([["a.jpg", "cat"]]), "X has 2 columns: give the one with the paths, or the imag"),
        (Column(np.array([["a.jpg", "cat"]])), "X has 2 columns"),
        (np.zeros((4, 5)), "X has 5 columns"),
        (np.zeros((4, 1)), "image 0 of X is .*: give a path"),
        (["a.jpg", None], "image 1 of X is None: give a path, the bytes of a file, a PIL image"),
        ([["a.jpg"], ["b.jpg", "c.jpg"]], "image 0 of X is of type list"),
    ],
)
def test_what_is_no_column_of_images_is_told(X: Any, told: str) -> None:
    with pytest.raises(VggfeatError, match=told):
        VggFeaturizer(NET, scales=(32,)).fit(X)
    with pytest.raises(VggfeatError, match=told):
        VggFeaturizer(NET, scales=(32,)).fit(["a.jpg"]).transform(X)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"weights": "nonsense"}, "weights 'nonsense' are not known"),
        ({"layer": "fc9"}, "no layer 'fc9'"),
        ({"scales": (8,)}, "scale 8 is too small"),
        ({"pool": "mean"}, f"`pool` must be one of {', '.join(POOLINGS)}, not 'mean'"),
        ({"mirror": "no"}, "`mirror` must be True or False"),
        ({"device": "gpu"}, "no device 'gpu'"),
        ({"on_error": "skip"}, "`on_error` must be raise or nan, not 'skip'"),
    ],
)
def test_settings_of_the_wrong_kind_are_told_at_fit(settings: dict[str, Any], told: str) -> None:
    transformer = VggFeaturizer(**{"weights": NET, **settings})
    with pytest.raises(VggfeatError, match=told):
        transformer.fit(["a.jpg"])


def test_an_image_that_cannot_be_read_is_named_or_a_row_of_nan(
    paths: list[str], tmp_path: Path
) -> None:
    gone = str(tmp_path / "gone.jpg")
    some: list[Any] = [*paths[:2], gone, *paths[2:4], b"no image"]
    transformer = VggFeaturizer(NET, scales=(32,)).fit(some)  # opens none of them
    with pytest.raises(UnreadableImage) as raised:
        transformer.transform(some[:5])
    assert str(raised.value) == f"row 2 of X, {gone}: no such file"
    with pytest.raises(UnreadableImage, match=r"^row 0 of X: (not an|damaged)"):
        transformer.transform(some[5:])
    X = transformer.set_params(on_error="nan").transform(some)
    assert np.isnan(X[[2, 5]]).all()
    assert_same_descriptors(X[[0, 1, 3, 4]], transformer.transform(paths[:4]))
    with pytest.raises(ValueError, match="NaN or infinity in 2 of 6 rows, first in row 2"):
        LinearSVM().fit(X, [0, 1] * 3)


# --- in scikit-learn ------------------------------------------------------------------------------


def test_a_pipeline_is_cross_validated_on_a_column_of_paths(paths: list[str]) -> None:
    """To the scores of descriptors that were made once."""
    pipeline = make_pipeline(VggFeaturizer("mini", scales=(96,)), LinearSVM())
    described = vggfeat.embed(vggfeat.load("mini"), paths, (96,))
    expected = cross_val_score(LinearSVM(), described, LABELS, cv=3)
    assert expected.mean() > 0.7
    for X in (paths, np.array(paths)[:, None]):
        np.testing.assert_array_equal(cross_val_score(pipeline, X, LABELS, cv=3), expected)


def test_scales_and_pooling_are_searched(paths: list[str]) -> None:
    pipeline = make_pipeline(VggFeaturizer(NET), LinearSVM())
    grid = {
        "vggfeaturizer__scales": [(32,), (32, 48)],
        "vggfeaturizer__pool": ["average", "stack"],
        "linearsvm__C": [1.0],
    }
    search = GridSearchCV(pipeline, grid, cv=2, error_score="raise").fit(np.array(paths), LABELS)
    assert len(search.cv_results_["params"]) == 4
    lengths = {"average": 1, "stack": len(search.best_params_["vggfeaturizer__scales"])}
    best = search.best_params_["vggfeaturizer__pool"]
    assert search.best_estimator_[-1].n_features_in_ == 512 * lengths[best]
    assert search.predict(paths).tolist() == LABELS.tolist()


def test_its_values_have_names(paths: list[str]) -> None:
    transformer = VggFeaturizer(NET, scales=(48, 32))
    with pytest.raises(NotFittedError):
        transformer.get_feature_names_out()
    names = transformer.fit(paths).get_feature_names_out()
    assert [*names[:2], names[-1]] == ["fc7_0", "fc7_1", "fc7_511"]
    names = transformer.set_params(pool="stack", layer="pool5").fit(paths).get_feature_names_out()
    assert [names[0], names[63], names[64]] == ["pool5_48_0", "pool5_48_63", "pool5_32_0"]
    assert len(names) == transformer.n_features_out_ == transformer.transform(paths[:1]).shape[1]
    assert transformer.n_features_in_ == 1 and not hasattr(transformer, "classes_")


def test_a_frame_comes_out_where_pandas_is_there(paths: list[str]) -> None:
    pandas: Any = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"path": paths[::6], "width": [1.0, 2.0, 3.0, 4.0]}, index=[*"abcd"])
    transformer = VggFeaturizer(NET, scales=(32,)).set_output(transform="pandas")
    expected = clone(transformer).set_output(transform="default").fit_transform(paths[::6])
    for X in (frame["path"], frame[["path"]]):
        out = transformer.fit_transform(X)
        assert out.columns[-1] == "fc7_511" and out.index.tolist() == [*"abcd"]
        np.testing.assert_array_equal(out.to_numpy(), expected)
    with pytest.raises(VggfeatError, match="X has 2 columns"):
        transformer.fit(frame)
    for column in ("path", ["path"]):
        joined = ColumnTransformer([("image", transformer, column)], remainder="passthrough")
        out = joined.set_output(transform="pandas").fit_transform(frame)
        assert out.shape == (4, 513) and out.columns[0] == "image__fc7_0"


def test_output_as_a_frame_asks_for_what_is_missing(
    paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    transformer = VggFeaturizer(NET, scales=(32,)).set_output(transform="pandas")
    with pytest.raises(ImportError, match="pandas"):
        transformer.fit_transform(paths[:1])


def test_it_is_pickled_without_the_network(
    paths: list[str], ours: Ours, he: Nets, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, net = ours
    transformer = VggFeaturizer(file, scales=(32,), workers=1).fit(paths)
    expected = transformer.transform(paths[:2])
    text = pickle.dumps(transformer)
    assert len(text) < 4096 < file.stat().st_size
    again = pickle.loads(text)
    assert again.get_params() == transformer.get_params()
    np.testing.assert_array_equal(again.transform(paths[:2]), expected)
    moved = file.with_name("moved.safetensors")
    file.rename(moved)
    np.testing.assert_array_equal(again.transform(paths[:2]), expected)  # it is loaded
    lost = pickle.loads(text)
    with pytest.raises(VggfeatError, match="no weights file at"):
        lost.transform(paths)
    np.testing.assert_array_equal(lost.set_params(weights=moved).transform(paths[:2]), expected)
    other = he("A", num_classes=3, width=0.125, crop=32)
    other.load_state_dict({key: 2 * value for key, value in net.state_dict().items()})
    save_weights(file, other, vggfeat.load(moved).preprocessing)
    with pytest.raises(VggfeatError, match="are not those that described the images"):
        pickle.loads(text).transform(paths)


def test_a_pickle_keeps_the_precision(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = pickle.dumps(VggFeaturizer(NET, scales=(32,)).fit(paths))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    again = pickle.loads(text)
    again.transform(paths[:1])
    assert again._network.precision == again.description_.precision == "float32"


def test_it_is_fitted_anew_like_any_other(paths: list[str]) -> None:
    """What scikit-learn's checks ask with numbers, with images."""
    scales = [32, 48]
    transformer = VggFeaturizer(NET, scales=scales, batch_size=1)
    with pytest.raises(NotFittedError):
        transformer.transform(paths)
    copy = clone(transformer.fit(paths, LABELS))
    assert not hasattr(copy, "description_") and copy.get_params() == transformer.get_params()
    X = transformer.transform(paths)
    before, params = dict(vars(transformer)), transformer.get_params()
    order = np.random.default_rng(0).permutation(len(paths))
    assert_same_descriptors(transformer.transform(np.array(paths)[order]), X[order])
    assert_same_descriptors(transformer.transform(paths[3:4]), X[3:4])
    assert vars(transformer) == before and transformer.get_params() == params
    assert transformer.scales is scales == [32, 48]
    assert_same_descriptors(transformer.fit(paths[::-1]).transform(paths), X)
    other = transformer.set_params(weights=OTHER).fit(paths).transform(paths)
    assert np.abs(other - X).max() > 1e-3


NUMBERS = "it feeds numbers, and X is a column of images"
EXPECTED = dict.fromkeys(
    [
        "check_complex_data",
        "check_dict_unchanged",
        "check_dont_overwrite_parameters",
        "check_dont_overwrite_attributes",
        "check_dtype_object",
        "check_estimators_dtypes",
        "check_estimators_fit_returns_self",
        "check_estimators_nan_inf",
        "check_estimators_overwrite_params",
        "check_estimators_pickle",
        "check_f_contiguous_array_estimator",
        "check_fit1d",
        "check_fit2d_1feature",
        "check_fit2d_1sample",
        "check_fit2d_predict1d",
        "check_fit_check_is_fitted",
        "check_fit_idempotent",
        "check_fit_score_takes_y",
        "check_methods_sample_order_invariance",
        "check_methods_subset_invariance",
        "check_n_features_in",
        "check_n_features_in_after_fitting",
        "check_pipeline_consistency",
        "check_positive_only_tag_during_fit",
        "check_readonly_memmap_input",
        "check_transformer_data_not_an_array",
        "check_transformer_general",
        "check_transformer_preserve_dtypes",
    ],
    NUMBERS,
) | {
    "check_estimators_empty_data_messages": "it asks for a ValueError; ours is VggfeatError",
    "check_estimator_sparse_array": "it asks for the word sparse; ours names the type, csr_array",
    "check_estimator_sparse_matrix": "it asks for the word sparse; ours names the type, csr_matrix",
    "check_estimator_sparse_tag": "it feeds sparse numbers, and numbers, and compares",
}
PASSED = {
    "check_estimator_cloneable",
    "check_estimator_repr",
    "check_no_attributes_set_in_init",
    "check_do_not_raise_errors_in_init_or_set_params",
    "check_estimators_unfitted",
    "check_transformers_unfitted",
    "check_mixin_order",
    "check_parameters_default_constructible",
    "check_get_params_invariance",
    "check_set_params",
    "check_valid_tag_types",
}


def test_scikit_learns_checks_pass_but_for_those_that_feed_numbers() -> None:
    transformer = VggFeaturizer(NET)
    tags = get_tags(transformer)
    assert tags.input_tags.string and tags.input_tags.one_d_array and tags.input_tags.two_d_array
    assert not (tags.input_tags.allow_nan or tags.target_tags.required or tags.no_validation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(
            transformer, expected_failed_checks=EXPECTED, on_skip=None, on_fail="raise"
        )
    of: dict[str, set[str]] = {}
    for result in results:
        of.setdefault(result["status"], set()).add(result["check_name"])
    assert of["passed"] >= PASSED
    assert of["xfail"] <= EXPECTED.keys()
