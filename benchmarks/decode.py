"""Inference: prefill of 128 tokens and decode of 64 after them, one row, beside llama.cpp and onnxruntime-genai.

Random Llama models of three sizes; the peers get the same weights. Each figure comes from a process of its own; rounds
alternate between all that is compared. Only the standard library is imported above, as peers run this file too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT, NEW, REPEATS = 128, 64, 3
_LAYER = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
SHAPES: dict[str, dict[str, Any]] = {
    "15m": {**dict(zip(_LAYER, (288, 6, 6, 6, 768), strict=True)), "vocab_size": 32_000},
    "135m": {**dict(zip(_LAYER, (576, 30, 9, 3, 1536), strict=True)), "vocab_size": 49_152},  # SmolLM
    "1.1b": {**dict(zip(_LAYER, (2048, 22, 32, 4, 5632), strict=True)), "vocab_size": 32_000},  # TinyLlama
}
UNTIED = ("1.1b",)
# (precision, the peers' names) -> size -> least ratios of (decode, prefill).
BARS: dict[tuple[str, tuple[str, ...]], dict[str, tuple[float, float]]] = {
    ("int4", ("llama.cpp Q4_0", "llama.cpp Q4_K_M")): {"15m": (2.0, 0.95), "135m": (1.25, 1.15), "1.1b": (1.12, 1.3)},
    ("int4", ("genai int4",)): {"15m": (1.4, 1.5), "135m": (1.4, 1.5), "1.1b": (1.4, 1.5)},
    ("int8", ("llama.cpp Q8_0",)): {"135m": (1.2, 3.8), "1.1b": (1.15, 4.0)},
    ("int4+int8", ("openvino int4",)): {"135m": (1.5, 1.25), "1.1b": (1.3, 1.25)},
}


# ----------------------------------------------------------------------------------------------------------------
# What is compared


def write_model(folder: Path, size: str) -> Path:
    """A model folder of a size: random weights, and a tokenizer of as many words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers

    from llmcli.models.config import DecoderConfig
    from llmcli.models.decoder import Decoder
    from llmcli.models.folder import save_model

    shape = SHAPES[size]
    head_dim = shape["hidden_size"] // shape["num_attention_heads"]
    tied = size not in UNTIED
    config = DecoderConfig(
        "llama", head_dim=head_dim, max_position_embeddings=2048, norm_eps=1e-5, tie_word_embeddings=tied, **shape
    )
    model, generator = Decoder(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02, generator=generator) if parameter.ndim > 1 else parameter.fill_(1.0)
    folder.mkdir(parents=True)
    save_model(model, folder, special_ids={"bos_token_id": 1, "eos_token_id": 2})
    tokenizer = Tokenizer(models.WordLevel({f"t{place}": place for place in range(shape["vocab_size"])}, "t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "t1", "eos_token": "t2"}))
    return folder


def write_onnx(model: Path, precision: str, **values: Any) -> Path:
    """The model's ONNX folder beside it, unchecked: weights of chance have no quality to be kept."""
    from llmcli.config import ExportConfig
    from llmcli.operations.export import export

    folder = model.with_name("-".join((model.name, precision, *map(str, values.values()))))
    list(export(model, folder, ExportConfig(precision=precision, check=False, **values)))
    return folder


def write_gguf(model: Path, folder: Path) -> None:
    """By llama.cpp's interpreter: the model as GGUF in float16, and quantized in three ways."""
    import gguf
    import llama_cpp
    import numpy as np

    config = json.loads((model / "config.json").read_text())
    heads, narrow = config["num_attention_heads"], config["num_key_value_heads"]
    folder.mkdir()
    whole = folder / "F16.gguf"
    kind = config["model_type"]  # llama or qwen3, which llama.cpp calls by the same names
    writer = gguf.GGUFWriter(str(whole), kind)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(narrow)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.get("rope_theta", 10_000.0))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, kind.upper()), config["num_hidden_layers"])
    for file in sorted(model.glob("*.safetensors")):
        content = np.memmap(file, np.uint8, "r")
        begin = 8 + int(content[:8].view(np.uint64)[0])
        entries = json.loads(content[8:begin].tobytes())
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            array = content[begin + first : begin + last].view(np.float32).reshape(entry["shape"])
            if kind == "llama" and name.endswith(
                ("q_proj.weight", "k_proj.weight")
            ):  # its rope turns neighbours, not halves
                parts = heads if name.endswith("q_proj.weight") else narrow
                array = array.reshape(parts, 2, -1, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
            stored = np.float32 if array.ndim == 1 else np.float16
            writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(array, stored))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name in ("Q4_0", "Q4_K_M", "Q8_0"):
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
        target = folder / f"{name}.gguf"
        if llama_cpp.llama_model_quantize(str(whole).encode(), str(target).encode(), settings):
            raise SystemExit(f"llama.cpp could not write {target}")
    whole.unlink()


# ----------------------------------------------------------------------------------------------------------------
# Measuring, each in a process of its own


def _timed(prefill: Callable[[], Any], decode: Callable[[], Any]) -> dict[str, float]:
    """Tokens/s of both, the median of a few; a first one makes ready."""
    found: list[tuple[float, float]] = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        prefill()
        middle = time.perf_counter()
        decode()
        found.append((PROMPT / (middle - began), NEW / (time.perf_counter() - middle)))
    prefills, decodes = zip(*found[1:], strict=True)
    return {"prefill": statistics.median(prefills), "decode": statistics.median(decodes)}


def run_ours(folder: Path, threads: int) -> dict[str, float]:
    """llmcli's session."""
    import numpy as np

    from llmcli.runtime.open import open_session

    session = open_session(folder, threads=threads)
    ids = np.random.default_rng(0).integers(0, session.vocab_size, PROMPT + NEW)

    def decode() -> None:
        for place in range(PROMPT, PROMPT + NEW):
            session.feed(ids[None, place : place + 1])

    return _timed(lambda: session.start([ids[:PROMPT].tolist()]), decode)


def run_llama(model: Path, threads: int) -> dict[str, float]:
    """llama.cpp, by the functions of its library."""
    import ctypes
    import random

    import llama_cpp

    if sys.platform == "linux":
        # Leave to use AMX's tiles, which its library does not ask the kernel for in every build: arch_prctl(
        # ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA). Without AMX the call fails, and nothing is lost.
        ctypes.CDLL(None).syscall(158, 0x1023, 18)
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    loaded = llama_cpp.llama_model_load_from_file(str(model).encode(), llama_cpp.llama_model_default_params())
    if not loaded:
        raise SystemExit(f"llama.cpp could not read {model}")
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = 256, 512, 512
    settings.n_threads = settings.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(loaded, settings)
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(loaded))
    chosen = random.Random(0)

    def feed(count: int) -> None:
        ids = (llama_cpp.llama_token * count)(*(chosen.randrange(size) for _ in range(count)))
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, count)):
            raise SystemExit("llama.cpp could not decode")
        llama_cpp.llama_get_logits_ith(context, -1)  # waits for the result

    def prefill() -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        feed(PROMPT)

    return _timed(prefill, lambda: [feed(1) for _ in range(NEW)])


def run_genai(folder: Path, threads: int) -> dict[str, float]:
    """onnxruntime-genai, greedy; its threads are its own choice."""
    import onnxruntime_genai

    del threads
    model = onnxruntime_genai.Model(str(folder))
    ids = [3 + 17 * place % 1000 for place in range(PROMPT)]
    kept: list[Any] = []

    def prefill() -> None:
        params = onnxruntime_genai.GeneratorParams(model)
        params.set_search_options(max_length=256, min_length=256, do_sample=False)
        kept[:] = [onnxruntime_genai.Generator(model, params)]
        kept[0].append_tokens(ids)
        kept[0].generate_next_token()  # chooses; what follows computes

    return _timed(prefill, lambda: [kept[0].generate_next_token() for _ in range(NEW)])


def write_openvino(model: Path, folder: Path) -> None:
    """By OpenVINO's interpreter: the model by optimum-intel in int4, with a tokenizer of bytes, as ids are given."""
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    block = "128" if model.name == "1.1b" else "64"
    words = ["--model", model, "--task", "text-generation-with-past", "--weight-format", "int4", "--sym"]
    tool = str(Path(sys.executable).with_name("optimum-cli"))
    done = subprocess.run(
        [tool, "export", "openvino", *map(str, words), "--group-size", block, "--ratio", "1.0", folder]
    )
    if done.returncode:
        raise SystemExit("optimum-cli could not convert the model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = Tokenizer(models.BPE({letter: place for place, letter in enumerate(alphabet)}, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    whole = PreTrainedTokenizerFast(tokenizer_object=bytes_alone, eos_token="!")
    for part, name in zip(convert_tokenizer(whole, with_detokenizer=True), ("tokenizer", "detokenizer"), strict=True):
        openvino.save_model(part, folder / f"openvino_{name}.xml")


def run_openvino(folder: Path, threads: int) -> dict[str, float]:
    """OpenVINO GenAI, greedy. Each prompt is another: one that it has read before it need not read again."""
    import numpy as np
    import openvino
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", INFERENCE_NUM_THREADS=threads)
    settings = openvino_genai.GenerationConfig(max_new_tokens=NEW + 1, ignore_eos=True, do_sample=False)
    found = []
    for number in range(REPEATS + 1):
        ids = openvino.Tensor(np.array([[3 + (17 * place + number) % 1000 for place in range(PROMPT)]], np.int64))
        given = openvino_genai.TokenizedInputs(ids, openvino.Tensor(np.ones((1, PROMPT), np.int64)))
        metrics = pipeline.generate(given, settings).perf_metrics
        found.append((1000 * PROMPT / metrics.get_ttft().mean, 1000 / metrics.get_tpot().mean))
    prefills, decodes = zip(*found[1:], strict=True)
    return {"prefill": statistics.median(prefills), "decode": statistics.median(decodes)}


RUNS: dict[str, Callable[[Path, int], dict[str, float]]] = {
    "ours": run_ours,
    "llama": run_llama,
    "genai": run_genai,
    "openvino": run_openvino,
}


def elsewhere(python: str, *words: object) -> str:
    """This file in another process; what it wrote."""
    ended = subprocess.run([python, __file__, "--job", *map(str, words)], capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{python} {' '.join(map(str, words))}: {ended.stderr[-2000:]}")
    return ended.stdout


def jobs_of(size: str, place: Path, options: argparse.Namespace) -> dict[str, tuple[str, str, Path]]:
    """What runs for a size: name -> (interpreter, kind, model)."""
    model = write_model(place / size, size)
    ours = {name: write_onnx(model, name, block_size=options.block_size) for name in ("int4", "int8")}
    beside_openvino = options.openvino_python and size in BARS["int4+int8", ("openvino int4",)]
    if beside_openvino:
        ours["int4+int8"] = write_onnx(model, "int4", block_size=options.block_size, prefill="int8")
    jobs = {f"llmcli {name}": (sys.executable, "ours", folder) for name, folder in ours.items()}
    if options.genai_python:
        own = place / f"{size}-genai"
        words = ["-m", "onnxruntime_genai.models.builder", "-i", model, "-o", own, "-p", "int4", "-e", "cpu"]
        ended = subprocess.run([options.genai_python, *map(str, words)], capture_output=True, text=True)
        if ended.returncode:
            print(f"{size}: genai's builder failed ({ended.stderr.strip().splitlines()[-1:]}); it runs llmcli's folder")
        name = "genai on llmcli's int4" if ended.returncode else "genai int4"
        jobs[name] = (options.genai_python, "genai", ours["int4"] if ended.returncode else own)
    if options.llama_python:
        elsewhere(options.llama_python, "gguf", model, place / f"{size}-gguf")
        for name in ("Q4_0", "Q4_K_M", "Q8_0"):
            jobs[f"llama.cpp {name}"] = (options.llama_python, "llama", place / f"{size}-gguf" / f"{name}.gguf")
    if beside_openvino:
        elsewhere(options.openvino_python, "openvino-convert", model, place / f"{size}-openvino")
        jobs["openvino int4"] = (options.openvino_python, "openvino", place / f"{size}-openvino")
    for path in model.glob("*.safetensors"):
        path.unlink()  # the greatest of the files, and no more needed
    return jobs


def main() -> None:
    """Measures, prints a table and one JSON line; exit 1 below a bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["15m", "135m"], help="1.1b takes 15 GB of disk")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--block-size", choices=("auto", "32", "64", "128"), default="auto")
    parser.add_argument("--llama-python", help="interpreter that has llama-cpp-python and gguf")
    parser.add_argument("--genai-python", help="interpreter that has onnxruntime-genai; with torch, for its own export")
    parser.add_argument("--openvino-python", help="interpreter that has openvino-genai and optimum-intel")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job and options.job[0] in ("gguf", "openvino-convert"):
        write = write_gguf if options.job[0] == "gguf" else write_openvino
        write(Path(options.job[1]), Path(options.job[2]))
        return
    if options.job:
        print(json.dumps(RUNS[options.job[0]](Path(options.job[1]), int(options.job[2]))))
        return
    from llmcli.data.cores import available_cores

    threads = options.threads or available_cores()
    speeds: dict[str, dict[str, dict[str, list[float]]]] = {}
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as place:
            jobs = jobs_of(size, Path(place), options)
            found = speeds[size] = {name: {"decode": [], "prefill": []} for name in jobs}
            for _ in range(options.rounds):
                for name, (python, kind, model) in jobs.items():
                    for test, value in json.loads(elsewhere(python, kind, model, threads)).items():
                        found[name][test].append(value)
    medians = {
        size: {
            name: {test: statistics.median(values) for test, values in tests.items()} for name, tests in jobs.items()
        }
        for size, jobs in speeds.items()
    }
    print(f"{'size':<6} {'engine':<24} {'decode':>10} {'min':>9} {'max':>9} {'prefill':>10} {'min':>9} {'max':>9}")
    for size, jobs in speeds.items():
        for name, tests in jobs.items():
            cells = [f"{statistics.median(v):>10,.1f} {min(v):>9,.1f} {max(v):>9,.1f}" for v in tests.values()]
            print(f"{size:<6} {name:<24} {' '.join(cells)}")
    ratios = list(compare(medians))
    print(f"\n{'size':<6} {'precision':<10} {'beside':<34} {'test':<8} {'ratio':>6} {'bar':>6}")
    for item in ratios:
        print(
            f"{item['size']:<6} {item['precision']:<10} {item['beside']:<34} {item['test']:<8} "
            f"{item['ratio']:>6.2f} {item['bar']:>6.2f}"
        )
    ok = all(item["ratio"] >= item["bar"] for item in ratios)
    print(json.dumps({"benchmark": "decode", "tokens_per_second": speeds, "ratios": ratios, "ok": ok}))
    sys.exit(0 if ok else 1)


def compare(medians: dict[str, dict[str, dict[str, float]]]) -> Any:
    """Each bar with what was reached, the fastest of the peers that it names; those that did not run are left out."""
    for (precision, peers), sizes in BARS.items():
        for size, bars in sizes.items():
            there = [medians[size][peer] for peer in peers if peer in medians.get(size, {})]
            for test, bar in zip(("decode", "prefill"), bars, strict=True):
                if there:
                    fastest = max(peer[test] for peer in there)
                    ratio = medians[size][f"llmcli {precision}"][test] / fastest
                    beside = " or ".join(peers)
                    yield {
                        "size": size, "precision": precision, "beside": beside, "test": test, "ratio": ratio, "bar": bar
                    }  # fmt: skip


if __name__ == "__main__":
    main()
