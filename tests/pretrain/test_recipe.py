"""The recipe's numbers are the paper's; the chain is the paper's; bad values are refused in a
sentence.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.checkpoint import State
from pretrain.recipe import chain, read_recipe, select
from vggfeat.errors import VggfeatError, WrongUsage


def test_the_papers_numbers() -> None:
    recipe = read_recipe("paper")
    assert (recipe.batch_size, recipe.momentum, recipe.weight_decay, recipe.dropout) == (
        256,
        0.9,
        5e-4,
        0.5,
    )
    assert (recipe.rate_divisor, recipe.rate_drops, recipe.crop, recipe.width) == (10, 3, 224, 1)
    assert (recipe.random_layers, recipe.init_std, recipe.colour_std) == ("normal", 0.01, 0.1)
    # 370K iterations are 74 epochs of 1,281,167 images in batches of 256
    assert recipe.stages[0].iterations_of(1_281_167, 256) == 370_000
    assert round(370_000 * 256 / 1_281_167) == 74


def test_the_rate_falls_where_the_held_out_error_stops_falling() -> None:
    """Sect. 3.1: by 10, three times. A fourth plateau ends the stage; an error that equals the
    lowest is none lower.
    """
    recipe = read_recipe("paper", ["patience=2"])
    state = State(learning_rate=1e-2)
    rates = []
    for error in (50, 40, 40, 41, 39, 45, 39, 39, 44, 41):
        state.judge(error, recipe)
        rates.append(round(state.learning_rate, 9))
    assert rates == [1e-2] * 3 + [1e-3] * 3 + [1e-4] * 2 + [1e-5] * 2
    assert (state.drops, state.best_top1, state.finished) == (3, 39, False)
    state.judge(39, recipe)
    assert state.finished


@pytest.mark.parametrize(
    ("net", "init", "stages"),
    [
        ("D", "A", ["A-256", "D-256", "D-384", "D-256-512"]),
        ("E", "A", ["A-256", "E-256", "E-384", "E-256-512"]),
        ("D", "glorot", ["D-256", "D-384", "D-256-512"]),
        ("A", "A", ["A-256"]),
        ("A-LRN", "A", ["A-LRN-256"]),
        ("B", "A", ["A-256", "B-256"]),
        ("B-5x5", "A", ["B-5x5-256"]),
    ],
)
def test_chains(net: str, init: str, stages: list[str]) -> None:
    recipe = chain(read_recipe("paper"), net, init)
    assert [stage.name for stage in recipe.stages] == stages
    assert recipe.random_layers == ("glorot" if init == "glorot" else "normal")
    rates = {stage.name: stage.learning_rate for stage in recipe.stages}
    assert all(rate == (1e-2 if name.endswith("-256") else 1e-3) for name, rate in rates.items())


def test_every_number_can_be_overridden() -> None:
    recipe = read_recipe(
        "paper",
        ["batch_size=128", "NET-384.learning_rate=5e-4", "*.epochs=2", "random_layers=glorot"],
    )
    assert recipe.batch_size == 128
    assert recipe.random_layers == "glorot"
    assert [stage.learning_rate for stage in recipe.stages] == [1e-2, 1e-2, 5e-4, 1e-3, 1e-3, 1e-3]
    assert [stage.iterations_of(1000, 100) for stage in recipe.stages] == [20] * 6
    assert read_recipe("paper", ["NET-256-512.learn=fc"]).stages[3].name == "NET-256-512-fc"
    # by the net's own name, as the plan prints it; A's own stage is not D's
    assert read_recipe("paper", ["D-256.iterations=7"], "D").stages[1].iterations == 7
    assert [s.iterations for s in read_recipe("paper", ["A-256.iterations=7"], "D").stages[:2]] == [
        7,
        370_000,
    ]
    # together, in any order: a crop that fits only the scales given beside it
    numbers = [
        "crop=288",
        "NET-256.train_scale=[288,288]",
        "A-256.train_scale=[288,288]",
        "NET-256-512.train_scale=[288,512]",
    ]
    assert read_recipe("paper", numbers) == read_recipe("paper", numbers[::-1])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("batch_sise=3", "batch_sise=3 can't have 'batch_sise': a Recipe has name"),
        ("NET-385.learning_rate=1e-3", "there is no stage 'NET-385'"),
        ("batch_size=0", "batch_size must lie in"),
        ("batch_size=big", "batch_size must be a whole number, not 'big'"),
        ("batch_size=true", "batch_size must be a whole number, not True"),
        ("batch_size=0x" + "f" * 5000, r"batch_size must be less than 2\^63, not a huge number"),
        ("crop=225", "not a multiple of 32"),
        ("crop=288", "smaller than the crop"),
        ("*.learning_rate=-1", "learning_rate must be positive"),
        ("*.train_scale=[300, 200]", "train_scale must be"),
        ("drop_by=[0.9, 0.5]", "drop_by must be"),
        ("dropout", "write KEY=VALUE"),
        ("stages=3", "write STAGE.KEY=VALUE"),
        (
            "learning_rate=0.1",
            (
                r"a stage's: write \*.learning_rate=0.1 for all stages, or STAGE.learning_rate,"
                r" STAGE one of A-256, NET-"
            ),
        ),
        ("*.momentum=0.5", "momentum is of the whole recipe: write momentum=0.5"),
        ("momentum=nan", "momentum must be a finite number, not nan"),
        ("momentum=2", "momentum must lie in"),
        ("width=" + "[" * 100_000, "width must be a finite number"),
        ("drop_by=[0.5, 'a']", r"drop_by\[1\] must be a finite number, not 'a'"),
        ("drop_by=[0.5, 2]", "drop_by must be"),
        ("mean=[1, 2]", "mean must be three numbers in 0..255"),
        ("covariance=[1, 2, 3]", r"covariance\[0\] must be a list, not 1"),
        ("name=2020-01-01", "name must be text"),
        ("*.train_scale=3", "train_scale must be a list, not 3"),
        ("*.train_scale=[256]", "train_scale must be a list of 2, not a list of 1"),
        ("*.train_scale=[256.5, 256.5]", r"train_scale\[0\] must be a whole number, not 256.5"),
        ("*.train_scale=[256, 1000000000]", "at most 8192"),
        ("*.epochs=1e300", "iterations and epochs are at most 1e9"),
        ("*.nets=[1]", r"nets\[0\] must be text, not 1"),
        (
            'stands_for={"36" = "257"}',
            "stands_for must give to an S, as 112 or 112-160, one of 256, 384, 256-512, each",
        ),
        ('stands_for={"S" = "256"}', "stands_for must give to an S"),
        ('stands_for={"36" = "256", "48" = "256"}', "stands_for must give to an S"),
        ("stands_for=3", "stands_for must be a record of names, not 3"),
        ("file=x", "file=x: write STAGE.KEY=VALUE"),
        ("covariance=[[1, 2, 0], [0, 1, 0], [0, 0, 1]]", "covariance must be symmetric"),
    ],
)
def test_a_bad_override_is_refused(override: str, says: str) -> None:
    with pytest.raises(WrongUsage, match=says) as refused:
        read_recipe("paper", [override])
    assert "\n" not in str(refused.value)


def test_recipe_files(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(
        'batch_size = 8\n[[stages]]\nnet = "NET"\ntrain_scale = [256, 256]\nlearning_rate ='
        " 1e-2\nepochs = 1\n"
    )
    assert chain(read_recipe(str(path)), "A").stages[0].epochs == 1.0
    with pytest.raises(
        VggfeatError, match="there is no recipe 'large'; give finetune, mini, paper"
    ):
        read_recipe("large")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = ", "is not TOML"),
        ("x = " + "[" * 50_000, "is not TOML"),
        ("x = " + "9" * 5000, "is not TOML"),
        ("#" * (1 << 16) + "\n", "is longer than the 64 KiB"),
        ("stages = 3", "stages must be a list, not 3"),
        ("stages = [3]", r"stages\[0\] must be a record, not 3"),
        ("width = 1.0", "has no \\[\\[stages\\]\\]"),
        ("[[stages]]\nnet = 'NET'", r"own.toml: stages\[0\].train_scale is missing"),
        ("depth = 3\n[[stages]]", "own.toml can't have 'depth': a Recipe has name, stages"),
        (f"{'depth' * 9999} = 3\n[[stages]]", r"can't have '(depth)+d\.\.\.: a Recipe has"),
        (
            "[[stages]]\nnet = 'Z'\ntrain_scale = [256, 256]\nlearning_rate = 1e-2\nepochs = 1",
            "there is no net 'Z'",
        ),
    ],
)
def test_recipe_files_that_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(VggfeatError, match=says) as refused:
        read_recipe(str(path))
    assert not isinstance(refused.value, WrongUsage)


def test_stages_are_chosen_by_name_or_number() -> None:
    recipe = chain(read_recipe("paper"), "D")
    assert select(recipe, "") == range(4)
    assert select(recipe, "D-384") == range(2, 3)
    assert select(recipe, "2-4") == select(recipe, "D-256:D-256-512") == range(1, 4)
    assert select(recipe, "1") == range(1)
    for text in ("5", "D-512", "4-2", "0"):
        with pytest.raises(VggfeatError):
            select(recipe, text)


def test_two_stages_of_one_name_are_refused() -> None:
    with pytest.raises(VggfeatError, match="two stages D-256"):
        chain(read_recipe("paper", ["NET-384.train_scale=[256, 256]"]), "D")


@pytest.mark.parametrize("override", ["width=16", "crop=4096"])
def test_a_net_that_is_too_large_is_refused_before_anything_is_read(override: str) -> None:
    scales = [f"*.train_scale=[{4096}, {4096}]"]
    with pytest.raises(VggfeatError, match="million parameters; at most 700 million are built"):
        chain(read_recipe("paper", [override, *scales]), "D", "normal")


OWN = """{numbers}
[[stages]]
net = "NET"
train_scale = [256, 256]
learning_rate = 1e-2
epochs = 1
"""


@pytest.mark.parametrize(
    ("numbers", "overrides", "stages", "typed"),
    [
        ("", ["seed=x"], "", True),
        ("", ["width=-1"], "", True),
        ("", ["width=16"], "", True),  # too large a net
        ("", ["crop=512"], "", True),  # larger than the file's S
        ("", ['*.nets=["A"]'], "", True),
        ("", ["NET-384.epochs=2"], "", False),  # the file could have it
        ("", [], "2", False),
        ("width = -1", [], "", False),
        ("width = 16", [], "", False),
        ("width = 16", ["seed=1"], "", False),
        ("width = 16", ["width=15"], "", False),
        ("width = 16", ["width=-1"], "", True),
    ],
)
def test_a_file_of_ones_own_is_wrong_or_what_is_typed(
    tmp_path: Path, numbers: str, overrides: list[str], stages: str, typed: bool
) -> None:
    path = tmp_path / "own.toml"
    path.write_text(OWN.format(numbers=numbers))
    with pytest.raises(VggfeatError) as refused:
        select(chain(read_recipe(str(path), overrides, "D"), "D"), stages)
    assert isinstance(refused.value, WrongUsage) == typed
    path.write_text(OWN.format(numbers="width = 16"))  # what is typed may mend the file
    assert chain(read_recipe(str(path), ["width=1"], "D"), "D").width == 1
