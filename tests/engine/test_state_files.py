"""States in files: saved by one engine, found by the next one's requests; what does not fit is refused by name."""

import json
import os

import pytest
import torch
from engine import Engine, random_prompt
from measured_heads import capacities
from safetensors import safe_open
from safetensors.torch import save_file

from momentkv_vllm import state_file
from momentkv_vllm.attention.head_reach import Probe
from momentkv_vllm.metrics import STATES
from momentkv_vllm.model_identity import model_identity
from momentkv_vllm.versions import installed_vllm

DOCUMENT = random_prompt(900, seed=3)
QUESTION = DOCUMENT + random_prompt(30, seed=1)[1:]
SETTINGS = {
    "policy": "momentkv",
    "budget_tokens": 256,
    "moment_dtype": "float32",
    "block_size": 16,
    "store_dtype": "model",
}


@pytest.fixture
def folder(tmp_path):
    return tmp_path


@pytest.fixture
def saving(engine, models, folder):
    """Starts an engine that keeps states in files."""

    def start(model=None, **options) -> Engine:
        given = {**SETTINGS, "state_folder": str(folder), "enable_prefix_caching": True, **options}
        return engine(model=model or models(seed=1), **given)

    return start


def ask(
    e: Engine, action: str, name: str = "document", tokens: list[int] = (), salt: str = "", kv_budget: str = ""
) -> dict:
    return e.vllm.engine_core.engine_core.kv_eviction_states(action, name, list(tokens), salt, kv_budget)


def figure(e: Engine, metric) -> float:
    return e.manager.metrics.values[metric, 0]


def save(e: Engine, document: list[int] = DOCUMENT, **more) -> dict:
    e.generate([document], 1)
    return ask(e, "save", tokens=document, **more)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"correction": "first"},
        {"store_dtype": "int4", "run_tokens": 8, "window_tokens": 64, "head_budgets": "equal"},
        {"store_dtype": "int8", "run_tokens": 8, "head_budgets": "measured"},
        {"policy": "keydiff", "correction": "off"},
    ],
    ids=["zeroth", "first", "int4", "measured heads", "keydiff"],
)
def test_a_request_starts_from_a_loaded_state(saving, engine, models, options):
    """The same tokens as of an engine that read everything; the last event of 900 tokens is at 896."""
    want = engine(**{**SETTINGS, **options}, model=models(seed=1)).generate([QUESTION], 24)
    saved = save(saving(**options))
    assert saved["tokens"] == 896 and saved["bytes"] > 0
    e = saving(**options)
    assert [ask(e, "load")["tokens"] for _ in range(2)] == [896, 896]
    assert figure(e, STATES) == 1, "a second time changes nothing"
    assert e.generate([QUESTION], 24) == want
    assert e.cached_tokens["r0"] == 896
    assert e.generate([QUESTION], 24) == want


def test_a_loaded_state_is_a_state_like_any_other(saving):
    """It goes with the cache's reset and under pressure, and can be saved again, to the same bytes."""
    save(saving())
    e = saving(num_gpu_blocks_override=40)
    ask(e, "load")
    first = contents(e)
    assert ask(e, "save", "again", DOCUMENT)["tokens"] == 896
    assert contents(e, "again") == first
    e.generate([random_prompt(600, seed=5), random_prompt(600, seed=6)], 4)
    e.generate([QUESTION], 4)
    assert e.cached_tokens["r2"] == 0
    ask(e, "load")
    assert e.vllm.reset_prefix_cache()
    e.generate([QUESTION], 4)
    assert e.cached_tokens["r3"] == 0


def contents(e: Engine, name: str = "document") -> dict[str, bytes]:
    folder = e.manager.kv_cache_spec.config.state_folder
    with safe_open(f"{folder}/{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}  # noqa: SIM118


def test_a_salt_is_part_of_what_is_found(saving):
    save(saving())
    e = saving()
    ask(e, "load", salt="a")
    for number, (salt, found) in enumerate([("b", 0), ("a", 896)]):
        e.generate([{"prompt_token_ids": QUESTION, "cache_salt": salt}], 4)
        assert e.cached_tokens[f"r{number}"] == found


def test_a_pool_without_room_refuses(saving):
    save(saving())
    e = saving(num_gpu_blocks_override=40)
    refusals = []
    for seed in range(2):
        e.add(random_prompt(300, seed), 60)
    e.run(lambda step: refusals.append(ask(e, "load").get("error")) if step == 20 else None)
    assert "the state needs 15 pages, " in refusals[0] and "load it when fewer requests run" in refusals[0]
    assert ask(e, "load")["tokens"] == 896


def test_what_is_not_there_and_what_is_not_evicted(saving):
    e = saving()
    assert "there is no state file document.safetensors" in ask(e, "load")["error"]
    assert "nothing is evicted of texts below 256 tokens" in save(e, random_prompt(200))["error"]


def test_names_are_plain(saving):
    e = saving()
    e.generate([DOCUMENT], 1)
    for name in ("../document", "/tmp/x", "a/b", "", ".hidden", "a.b", "x" * 101, "a\n"):
        for action in ("save", "load"):
            assert "is no name of a state" in ask(e, action, name, DOCUMENT)["error"], (name, action)


def test_links_are_not_followed(saving, folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "file.safetensors"
    e = saving()
    save(e)
    os.replace(folder / "document.safetensors", elsewhere)
    (folder / "document.safetensors").symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    for action in ("save", "load"):
        assert "is a link" in ask(e, action, tokens=DOCUMENT)["error"]
    assert elsewhere.read_bytes() == before


def damaged(path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut":
        data = data[:-100]
    elif how == "bit":
        data[-1000] ^= 1
    elif how == "text":
        data = bytearray(b"no tensors at all")
    elif how == "header":
        at = data.index(b"momentkv_state")
        place = data.index(b"896", at)
        data[place : place + 3] = b"880"
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("how", "words"),
    [("cut", "cannot be read"), ("bit", "checksum"), ("text", "cannot be read"), ("header", "checksum")],
)
def test_a_damaged_file_is_refused(saving, folder, how, words):
    save(saving())
    damaged(folder / "document.safetensors", how)
    e = saving()
    error = ask(e, "load")["error"]
    assert words in error and "document.safetensors" in error and "save it again" in error
    assert e.generate([QUESTION], 4) and e.cached_tokens["r0"] == 0


def rewritten(path, change) -> None:
    """The file with another header or other tensors, and a checksum that fits them."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[state_file.HEADER])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(header, tensors)
    state_file.write(path, header, tensors)


def other_tokens(header, tensors):
    tensors["tokens"][5] += 1


def other_columns(header, tensors):
    header["columns"][0][-1] += 1


def no_columns(header, tensors):
    del header["columns"]


def another_group(header, tensors):
    header["columns"].append([1])


def fewer_pages(header, tensors):
    for name in tensors:
        if name != "tokens":
            tensors[name] = tensors[name][:-1].clone()


def smaller_pages(header, tensors):
    for name in tensors:
        if name != "tokens":
            tensors[name] = tensors[name][:, :-16].clone()


def fewer_layers(header, tensors):
    del tensors[next(name for name in tensors if name != "tokens")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_tokens, "its tokens are not those of its header"),
        (other_columns, "pages in other places"),
        (no_columns, "its header is no state's"),
        (another_group, "pages in other places"),
        (fewer_pages, "not as many pages"),
        (smaller_pages, "has other pages in"),
        (fewer_layers, "has other layers"),
        (lambda header, tensors: header.update(momentkv="0.0.1"), "saved with momentkv '0.0.1', this server has '0.1.0'"),
        (lambda header, tensors: header.update(vllm="0.31.0"), f"saved with vllm '0.31.0', this server has '{installed_vllm()}'"),
        (lambda header, tensors: header.update(format=1), "saved with format 1, this server has 2"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)  # fmt: skip
def test_a_file_that_contradicts_itself_or_is_of_another_version(saving, folder, change, words):
    e = saving()
    save(e)
    rewritten(folder / "document.safetensors", change)
    free = e.pool.get_num_free_blocks()
    assert words in ask(e, "load")["error"]
    assert e.pool.get_num_free_blocks() == free


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget_tokens": 320}, "kv_eviction.budget_tokens 256, this server has 320"),
        ({"policy": "keydiff"}, "kv_eviction.policy 'momentkv', this server has 'keydiff'"),
        ({"dtype": "bfloat16"}, "with dtype 'float32', this server has 'bfloat16'"),
        ({"kv_cache_dtype": "fp8", "block_size": 32}, "with dtype 'float32', this server has 'float32 float8_e4m3fn'"),
        ({"block_size": 32}, "with page_tokens"),
        ({"sink_tokens": 8}, "kv_eviction.sink_tokens 4, this server has 8"),
    ],
    ids=lambda x: next(iter(x), None) if isinstance(x, dict) else "",
)
def test_other_settings_are_refused_by_name(saving, options, words):
    save(saving())
    e = saving(**options)
    error = ask(e, "load")["error"]
    assert words in error and "serve as it was saved" in error
    assert not e.manager.books[0].states.count()


def test_other_heads_are_refused(saving, monkeypatch):
    """What heads hold follows from the model, as far as its arithmetic does: a file says it, and is worth nothing elsewhere."""
    measured = {"store_dtype": "int8", "run_tokens": 8, "head_budgets": "measured"}
    e = saving(**measured)
    save(e)
    held = capacities(e)[0]
    monkeypatch.setattr(Probe, "reach", property(lambda self: self.far.amin(1)))
    other = saving(**measured)
    assert capacities(other)[0] != held
    error = ask(other, "load")["error"]
    assert (
        f"saved with tokens_of_heads.model.layers.0.self_attn.attn {held}, this server has {capacities(other)[0]}"
        in error
    )
    assert not other.manager.books[0].states.count()


def test_another_model_is_refused(saving, models):
    save(saving())
    assert "was saved with model '" in ask(saving(model=models(seed=2)), "load")["error"]


def test_a_model_is_known_by_its_weights(models, tmp_path):
    """Not by its folder's name, and not by its settings alone."""

    class Config:
        def __init__(self, folder):
            self.model, self.quantization, self.hf_config = str(folder), None, self

        def to_dict(self):
            return json.loads((models(seed=1) / "config.json").read_text()) | {"_name_or_path": self.model}

    copy = tmp_path / "copy"
    copy.mkdir()
    for file in models(seed=1).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    names = [model_identity(Config(folder)) for folder in (models(seed=1), copy, models(seed=2))]
    assert names[0] == names[1] != names[2]
    gone = [model_identity(Config(name)) for name in ("org/a", "org/b")]
    assert gone[0] != gone[1]


def test_a_file_is_its_owners(saving, folder):
    save(saving())
    assert (folder / "document.safetensors").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in folder.iterdir()] == ["document.safetensors"]


def test_what_is_listed(saving, folder):
    save(saving())
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
    (folder / "a.1-of-2.safetensors").write_bytes(b"")
    (folder / "a.2-of-2.safetensors").write_bytes(b"")
    (folder / "notes.txt").write_text("")
    found = {state["name"]: state for state in state_file.listed(str(folder))}
    assert found["document"]["tokens"] == 896 and found["document"]["ranks"] == 1
    assert sorted(found) == ["a", "document", "other"] and "error" in found["a"] and "error" in found["other"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"state_folder": "/no/such"}, "there is no such folder"),
        ({"state_share": 0}, "state_share above 0"),
        ({"prefill": "full"}, "prefill 'chunked' or 'auto'"),
        ({"enable_prefix_caching": False}, "prefix caching"),
        ({"worker_extension_cls": "some.Worker"}, "--worker-extension-cls some.Worker"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "--scheduler-cls"),
    ],
    ids=lambda x: next(iter(x), None) if isinstance(x, dict) else "",
)
def test_what_files_need_is_refused_before_the_start(saving, options, words):
    with pytest.raises(ValueError) as error:
        saving(**options)
    assert "kv_eviction.state_folder" in str(error.value) and words in str(error.value)


def test_a_state_below_what_prefill_auto_reads_exactly(saving):
    """A longer text left it; as a prompt of its own, the same tokens would be read exactly and have none."""
    settings = {"prefill": "auto", "exact_prompt_tokens": 980, "prefill_retire_tokens": 128}
    document = random_prompt(1000, seed=2)
    saved = save(saving(**settings), document)
    assert 0 < saved["tokens"] < 980
    e = saving(**settings)
    assert ask(e, "load")["tokens"] == saved["tokens"]
    e.generate([document + random_prompt(40, seed=3)[1:]], 4)
    assert e.cached_tokens["r0"] == saved["tokens"]


def test_without_a_folder_there_are_no_files(engine, models):
    e = engine(**SETTINGS, model=models(seed=1), enable_prefix_caching=True)
    assert "set --kv-eviction-config.state_folder" in save(e)["error"]
    assert not e.vllm.vllm_config.parallel_config.worker_extension_cls


def test_a_file_is_of_its_class(saving, engine, models):
    """Saved of a class, it fits that class of another server, and a server with that budget alone; no other class finds it."""
    budgets = {"small": 128, "large": 256, "exact": "off"}
    options = {"budgets": budgets, "budget_tokens": 128}
    chosen = {"extra_args": {"kv_budget": "large"}}
    e = saving(**options)
    e.generate([DOCUMENT], 1, **chosen)
    assert "have no state" in ask(e, "save", tokens=DOCUMENT)["error"]
    assert ask(e, "save", tokens=DOCUMENT, kv_budget="large")["tokens"] == 896
    assert "keeps no states" in ask(e, "save", tokens=DOCUMENT, kv_budget="exact")["error"]
    assert "is not one of small, large, exact" in ask(e, "save", tokens=DOCUMENT, kv_budget="big")["error"]
    want = engine(**SETTINGS, model=models(seed=1)).generate([QUESTION], 24)
    other = saving(**options)
    error = ask(other, "load")["error"]
    assert "was saved with kv_eviction.budget_tokens 256, this server has 128" in error
    assert ask(other, "load", kv_budget="large")["tokens"] == 896
    for name, cached in (("small", 0), ("exact", 0), ("large", 896)):
        tokens = other.generate([QUESTION], 24, extra_args={"kv_budget": name})
        assert other.cached_tokens[f"r{len(other.cached_tokens) - 1}"] == cached
        assert (tokens == want) == (name == "large")
    single = saving()
    assert ask(single, "load")["tokens"] == 896
    assert single.generate([QUESTION], 24) == want and single.cached_tokens["r0"] == 896
