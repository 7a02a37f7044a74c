"""Command-line words to configuration: what is accepted, what it becomes, and what is said of mistakes."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from phalanx.engine.config import EngineConfig
from phalanx.engine.errors import ConfigError, InvalidRequest
from phalanx.engine.protocol.sampling_params import SamplingParams
from phalanx.launch.chat import ChatKeys
from phalanx.launch.cli.compose import Job, compose, prepare_arguments
from phalanx.launch.cli.help import help_text
from phalanx.launch.cli.presets import CONFIGS, choices
from phalanx.launch.cli.schema import Keys, field_docs, from_words, key_docs, parse_size
from phalanx.launch.gateway import GatewayKeys
from phalanx.launch.generate import GenerateKeys, check_keys
from phalanx.launch.ranks.rank_info import RankInfo, read_rank_info
from phalanx.launch.serve import ServeKeys
from phalanx.launch.worker import WorkerKeys

ALONE = RankInfo()
UNDER_TORCHRUN = RankInfo(rank=1, size=4, local_rank=1, local_size=4, launched=True)
PROGRAMS: tuple[type[Keys], ...] = (Keys, GenerateKeys, ChatKeys, WorkerKeys)


def composed(*arguments: str, rank_info: RankInfo = RankInfo()) -> Job[GenerateKeys]:  # noqa: B008 (frozen)
    return compose(prepare_arguments(arguments, GenerateKeys, rank_info), GenerateKeys, rank_info)


def config(*arguments: str, rank_info: RankInfo = RankInfo()) -> EngineConfig:  # noqa: B008 (frozen)
    return composed("model=/m", *arguments, rank_info=rank_info).engine_config()


def test_without_any_word_the_engine_has_its_own_defaults() -> None:
    assert config() == EngineConfig(model="/m")


def test_every_field_of_the_engine_is_a_top_level_key_and_every_sampling_field_one_of_its_group() -> None:
    values = composed("model=/m").values
    assert {field.name for field in dataclasses.fields(EngineConfig)} <= set(values)
    assert set(values["sampling"]) == set(SamplingParams.__struct_fields__)


@pytest.mark.parametrize("keys", PROGRAMS)
def test_every_key_of_a_program_has_a_meaning_which_help_prints(keys: type[Keys]) -> None:
    docs, text = key_docs(keys), help_text(keys, "program", "about")
    own = {field.name for field in dataclasses.fields(keys)}
    engine = {field.name for field in dataclasses.fields(EngineConfig)} - {"sampling"}
    assert own | engine | {f"sampling.{name}" for name in SamplingParams.__struct_fields__} == set(docs)
    for name, meaning in docs.items():
        assert meaning
        assert f"\n  {name}" in text


def test_values_of_every_kind_arrive() -> None:
    made = config(
        "dtype=float32",
        "ranks=2",
        "rank_weights=[0.7,0.3]",
        "prefix_cache=false",
        "max_model_len=100",
        "sampling.stop=[END, '\n\n']",
        "sampling.logit_bias={5: -1.5}",
        "sampling.stop_token_ids=[1,2]",
        "sampling.temperature=1",
    )
    assert (made.dtype, made.ranks, made.rank_weights) == ("float32", 2, (0.7, 0.3))
    assert (made.prefix_cache, made.max_model_len) == (False, 100)
    assert made.sampling == SamplingParams(
        stop=("END", "\n\n"), logit_bias={5: -1.5}, stop_token_ids=(1, 2), temperature=1.0
    )
    assert config("sampling.stop=END").sampling.stop == ("END",)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4GiB", 4 * 2**30),
        ("512 MiB", 512 * 2**20),
        ("2GB", 2e9),
        ("1000000", 1e6),
        ("0.5", 0.5),
        ("1.5gib", 1.5 * 2**30),
    ],
)
def test_kv_memory_takes_sizes_bytes_and_fractions(text: str, value: float) -> None:
    assert config(f"kv_memory={text}").kv_memory == value


@pytest.mark.parametrize("text", ["4Gx", "lots", "1.2.3GiB", "-1GiB", "GiB"])
def test_a_size_that_is_none_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="size"):
        parse_size(text)
    with pytest.raises(ConfigError, match="kv_memory="):
        config(f"kv_memory={text}")


def test_a_preset_is_named_by_model_and_the_command_line_wins_over_it(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine.yaml").write_text(
        "# @package _global_\nmodel: /mine\nmax_num_seqs: 5\nsampling: {top_k: 3, top_p: 0.5}\nshape: {anything: 1}\n"
    )
    job = composed("sampling.top_p=0.9", "model=mine", "--config-dir", str(tmp_path))
    made = job.engine_config()
    assert (made.model, made.max_num_seqs, made.sampling.top_k, made.sampling.top_p) == ("/mine", 5, 3, 0.9)
    assert job.keys.shape == {"anything": 1}


def test_a_key_that_does_not_exist_in_a_preset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine.yaml").write_text("# @package _global_\nmodle: /mine\n")
    with pytest.raises(ConfigError, match=r"In 'models/mine': .*did you mean 'model'"):
        composed("model=mine", "--config-dir", str(tmp_path))


def test_the_runtime_for_numa_binds_cpu_ranks_unless_told_otherwise() -> None:
    made = config("runtime=cpu_numa")
    assert (made.device, made.bind_cpus) == ("cpu", "always")
    assert config("runtime=cpu_numa", "bind_cpus=never").bind_cpus == "never"


@pytest.mark.parametrize("group", ["engine", "runtime", "models", "bench"])
def test_every_preset_composes(group: str) -> None:
    assert choices(group)
    for name in choices(group):
        composed("model=/m", f"{group}={name}").engine_config()


def test_a_path_or_hub_name_is_no_preset() -> None:
    name = choices("models")[0]
    assert composed(f"model=./{name}").values["model"] == f"./{name}"
    assert composed(f"model=org/{name}").values["model"] == f"org/{name}"
    assert composed("model=/a b,c=(d)").values["model"] == "/a b,c=(d)"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["modle=/m"], ["'modle'", "did you mean 'model'"]),
        (["sampling.temprature=1"], ["did you mean 'sampling.temperature'"]),
        (["+max_num_seq=1"], ["did you mean 'max_num_seqs'"]),
        (["max_num_seqs=many"], ["max_num_seqs must be an integer", "'many'"]),
        (["sampling.top_k=1.5"], ["sampling.top_k must be an integer or null", "1.5"]),
        (["prefix_cache=perhaps"], ["prefix_cache must be true or false", "perhaps"]),
        (["rank_weights=[a]"], ["rank_weights", "'a'"]),
        (["dtype=int3"], ["dtype='int3'", "bfloat16"]),
        (["engine=fast"], ["'fast'", "latency", "throughput"]),
        (["max_num_seqs"], ["'max_num_seqs' cannot be read as key=value"]),
        (["--cfg", "jobs"], ["--cfg", "jobs"]),
        (["model=qwq_32b_previw"], ["did you mean 'qwq_32b_preview'"]),
    ],
)
def test_a_mistake_is_named_in_one_line_with_what_is_right(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config(*arguments)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_model_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"model is missing.*qwq_32b_preview"):
        composed("dtype=float32").engine_config()


def test_a_sampling_value_out_of_range_is_refused_before_anything_starts() -> None:
    with pytest.raises(InvalidRequest, match="top_p=2"):
        config("sampling.top_p=2")


@settings(max_examples=12, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
@example("Don't panic!")
@example("a,b=c (d) [e] {f} ${HOME} \\${x} \\\\${y}")
@example("ends with \\")
@example("\\'")
@example("two\nlines")
def test_a_prompt_arrives_as_it_was_written(text: str) -> None:
    quoted = len(text) > 1 and text[0] in "'\"" and text[0] == text[-1]
    if text == "null" or quoted:
        return
    assert composed("model=/m", f"prompt={text}").keys.prompt == text


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        *((ServeKeys, name) for name in ("journal", "api_keys_file", "ssl_certfile", "ssl_keyfile", "tokenizer_store")),
        (GatewayKeys, "secret_file"),
        (GenerateKeys, "journal"),
    ],
)
def test_a_path_of_any_characters_arrives_as_it_was_written(keys: type[Keys], name: str) -> None:
    path = "/my runs (1), a=b/{x}[0]"
    arguments = prepare_arguments(["model=/m", f"{name}={path}"], keys, ALONE)
    assert compose(arguments, keys, ALONE).values[name] == path


def test_a_prompt_quoted_for_hydra_is_unquoted_by_it() -> None:
    assert composed("model=/m", "prompt='as Hydra, reads it'").keys.prompt == "as Hydra, reads it"


def test_torchrun_sets_ranks_and_another_number_is_refused() -> None:
    assert config(rank_info=UNDER_TORCHRUN).ranks == 4
    assert config("ranks=4", rank_info=UNDER_TORCHRUN).ranks == 4
    with pytest.raises(ConfigError, match="ranks=1, but torchrun started 4"):
        config("ranks=1", rank_info=UNDER_TORCHRUN)


def test_ranks_of_torchrun_go_beside_the_other_overrides_wherever_they_stand() -> None:
    prepared = prepare_arguments(["--cfg", "job", "max_num_seqs=8"], GenerateKeys, UNDER_TORCHRUN)
    assert prepared == ["--cfg", "job", "ranks=4", "max_num_seqs=8"]


def test_a_rank_reads_its_place_from_torchruns_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert read_rank_info() == RankInfo(0, 1, 0, 1, launched=False)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert read_rank_info() == RankInfo(5, 8, 1, 4, launched=True)
    monkeypatch.setenv("LOCAL_RANK", "first")
    with pytest.raises(ConfigError, match="LOCAL_RANK='first'"):
        read_rank_info()


def test_meanings_are_read_from_below_each_field() -> None:
    assert field_docs(EngineConfig)["ranks"].startswith("Tensor-parallel ranks")
    assert field_docs(GenerateKeys)["shape"]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (GenerateKeys(), "either prompt=TEXT or input"),
        (GenerateKeys(prompt="a", input="b"), "either prompt=TEXT or input"),
        (GenerateKeys(prompt="a", output="b"), "output=b goes with input"),
        (GenerateKeys(input="/no/such"), "'/no/such' is not a file"),
        (GenerateKeys(input=__file__, resume=True), "resume=true needs output"),
        (GenerateKeys(input=__file__, output=__file__), "is the input file"),
    ],
)
def test_keys_of_generate_that_do_not_go_together_are_refused(keys: GenerateKeys, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_keys(keys)


@pytest.mark.parametrize("word", ["~max_queue", "~max_queue=5", "~prompt", "~sampling.n"])
def test_a_key_cannot_be_taken_away(word: str) -> None:
    with pytest.raises(ConfigError, match=r"takes a key away.*=VALUE"):
        prepare_arguments(["model=x", word], GenerateKeys, RankInfo())


def test_an_output_that_is_the_input_under_another_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("{}")
    os.link(tmp_path / "in.jsonl", tmp_path / "hard")
    (tmp_path / "soft").symlink_to("in.jsonl")
    for name in ("in.jsonl", "hard", "soft", "../" + tmp_path.name + "/in.jsonl"):
        with pytest.raises(ConfigError, match="is the input file"):
            check_keys(GenerateKeys(input=str(tmp_path / "in.jsonl"), output=str(tmp_path / name)))


def test_a_journal_that_is_the_input_or_the_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("{}")
    (tmp_path / "link").symlink_to("new")
    for journal, words in (("in", "is the file of input"), ("new", "of output"), ("link", "of output")):
        with pytest.raises(ConfigError, match=words):
            check_keys(GenerateKeys(input=f"{tmp_path}/in", output=f"{tmp_path}/new", journal=str(tmp_path / journal)))


def test_a_path_that_no_file_can_have_is_no_file() -> None:
    for path in ("x" * 5000, "a\0b", "x/" * 5000):
        with pytest.raises(ConfigError, match="is not a file"):
            check_keys(GenerateKeys(input=path))


def test_the_configuration_folder_is_part_of_the_package() -> None:
    assert (CONFIGS / "config.yaml").is_file()
    assert (CONFIGS / "__init__.py").is_file()


@dataclasses.dataclass
class Words:
    path: str | None = None
    numbers: list[int] | None = None


@pytest.mark.parametrize("path", ["/a: b", "[x", "{a", "*x", "'x", "a # b", "${HOME}", "\\${x}", "\udcc3", "1e3", ""])
def test_words_of_keys_of_text_are_taken_as_they_are_written(path: str) -> None:
    assert from_words(Words, [f"path={path}", "numbers=[1, 2]"]) == Words(path, [1, 2])


def test_of_a_word_given_twice_the_last_counts_and_null_is_none() -> None:
    assert from_words(Words, ["path=a", "path=b"]).path == "b"
    assert from_words(Words, ["path=a", "path=null"]).path is None


@pytest.mark.parametrize("word", ["numbers=[1", "numbers=\udcc3", "numbers={"])
def test_a_word_that_cannot_be_read_is_refused_in_one_line(word: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read: numbers must be a list such as") as caught:
        from_words(Words, [word])
    assert "\n" not in str(caught.value)
