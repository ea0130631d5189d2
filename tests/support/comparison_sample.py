"""Results of comparisons as `results.json` has them: a plain one, and one with all that can be awkward.

Values are drawn prompt by prompt, and what is reported of them is computed from those draws, so tables add up.
Intervals and p-values here are normal approximations: they stand for the real ones, which have tests of their own.
"""

import copy
import math
from typing import Any

import numpy as np

from distill.exam.metrics.catalogue import metric_of

HOSTILE = (
    "</script><script>window.owned = 1</script><img src=x onerror=window.owned=1> & \" ' <!-- "
    "\u2028 \u0000 \u202eesrever"
)
TYPICAL = {
    "bits_per_byte": (1.9, 0.5),
    "kl": (1.4, 0.4),
    "agreement": (0.46, 0.12),
    "agreement_5": (0.08, 0.03),
    "chrf": (23.0, 7.0),
    "length_ratio": (1.1, 0.2),
    "dream_recall": (0.31, 0.15),
    "dream_recall_chance": (0.12, 0.05),
}
"""Metric → mean over prompts and its spread."""

QUESTIONS = (
    "What happens when you drop a glass ball onto a stone floor?",
    "Why is the sky red at dusk?",
    "Name three things that float, and say why.",
    "How does a lock on a canal work?",
    "Was passiert, wenn man Eis in heißen Tee gibt?",
    "日本の首都はどこですか？",
    "ما هي عاصمة مصر؟",
    "What is 🎈 made of, and what makes it rise?",
)
DREAM = (
    "⟨spatial⟩⟨a glass ball⟩⟨lies on⟩⟨the shelf⟩⟨the shelf⟩⟨is above⟩⟨the floor⟩⟨temporal⟩⟨a hand⟩⟨lets go⟩⟨the ball⟩"
    "⟨causal⟩⟨the fall⟩⟨breaks⟩⟨the glass⟩⟨abstract⟩"
)


def small() -> dict[str, Any]:
    """Two runs of one seed: `hard` is clearly worse in bits per byte, nothing is clear in chrF2. No judge or curves."""
    results = _results(
        {"soft": {"bits_per_byte": 0.0, "chrf": 0.0}, "hard": {"bits_per_byte": 0.16, "chrf": 0.3}},
        prompts=24,
        seeds=1,
        curves=False,
    )
    results["warnings"] = ["One training each of soft, hard: nothing is said of what another seed would change."]
    return results


def big() -> dict[str, Any]:
    """Five systems, 200 prompts, three seeds of those that are trained, and a judge that is not always of sense.

    One comes from Ollama and lacks likelihoods; one has a held-out prompt in its training; prompts, dreams and answers
    are hostile, empty, in other scripts, and long; some values are null.
    """
    effects = {
        "soft": dict.fromkeys(TYPICAL, 0.0),
        "hard": {"bits_per_byte": 0.08, "kl": 0.2, "agreement": -0.03, "agreement_5": 0.02, "chrf": -1.2},
        "nodream": {"bits_per_byte": 0.004, "kl": 0.0, "agreement": 0.0, "agreement_5": 0.0, "chrf": 2.4},
        "a-student-with-a-rather-long-name": dict.fromkeys(TYPICAL, 0.0) | {"bits_per_byte": -0.1, "chrf": 1.5},
        "ollama:llama3.2:1b": {"chrf": 9.0, "length_ratio": 0.4},
    }
    results = _results(effects, prompts=200, seeds=3, curves=True)
    systems = results["systems"]
    outside = systems["ollama:llama3.2:1b"]
    outside |= {"targets": ["ollama:llama3.2:1b"], "kind": "ollama", "seeds": 1, "trained_on": None, "curves": []}
    outside["card"] |= {
        "kind": "ollama",
        "parameters": 1_235_814_432,
        "bytes": 1_321_098_329,
        "context": None,
        "quantization": "Q8_0",
        "dreams": False,
    }
    reason = "Ollama's API gives no likelihood of a given answer"
    outside["missing"] = dict.fromkeys(("bits_per_byte", "kl", "agreement", "agreement_5"), reason)
    outside["missing"] |= dict.fromkeys(("dream_recall", "dream_recall_chance"), "it does not dream")
    for name in outside["missing"]:
        del outside["metrics"][name]
    outside["cost"]["peak_bytes"] = None
    outside["cost"]["note"] = "memory is the server's, which it doesn't tell"
    outside["contamination"] |= {"checked": False, "reason": "nothing is known of what it was trained on", "prompts": 0}
    systems["hard"]["contamination"] |= {
        "exact": 1,
        "near": 2,
        "contained": 1,
        "examples": [{"prompt": QUESTIONS[0], "found": HOSTILE, "similarity": 0.91, "kind": "near"}],
    }
    systems["nodream"]["metrics"]["agreement_5"] = {
        "value": None,
        "low": None,
        "high": None,
        "prompts": 0,
        "seeds": [],
    }
    systems["nodream"]["left_out"] = 3
    systems["nodream"]["trained_on"]["tokens"] = 491_520
    systems["nodream"]["trained_on"]["settings"] = {"train.dreams": False, "train.soft_weight": 0.9}
    systems["hard"]["trained_on"]["settings"] = {"train.dreams": True, "train.soft_weight": 0.0}
    results["differences"] = [
        difference
        for difference in results["differences"]
        if difference["metric"] not in systems[difference["system"]]["missing"]
    ]
    for difference in results["differences"]:
        if difference["system"] == "nodream" and difference["metric"] == "agreement_5":
            difference |= dict.fromkeys(("value", "low", "high", "p", "p_corrected"))
            difference |= {"prompts": 0, "wins": 0, "ties": 0, "losses": 0}
        elif difference["metric"] in ("agreement_5", "length_ratio"):
            difference |= dict.fromkeys(("wins", "ties", "losses"))  # no prompt has a value, or none is the better one
    results["judge"] = _judge(list(effects))
    for i, shown in enumerate(results["disagreements"][:6]):
        shown["prompt"] = [HOSTILE, "x" * 300, "", "two\nlines", "# *no* [markup](x) | here", QUESTIONS[6]][i]
        shown["systems"]["soft"]["answer"] = HOSTILE
        shown["systems"]["hard"] |= {"dream": f"⟨spatial⟩⟨{HOSTILE}⟩ loose words ⟨causal⟩", "answer": ""}
        shown["values"]["nodream"] = None
    results["warnings"] = [
        "nodream: 3 of 200 prompts don't fit its context; differences are taken on the prompts that both can take.",
        "hard: 1 of the prompts, near copies of 2 and texts that hold 1 of them are in what it was trained on.",
        "They were not trained for as many tokens: soft 983,040, hard 983,040, nodream 491,520.",
    ]
    return copy.deepcopy(results)


def _results(effects: dict[str, dict[str, float]], prompts: int, seeds: int, curves: bool) -> dict[str, Any]:
    draw = np.random.default_rng(7)
    baseline, *others = effects
    metrics = [name for name in TYPICAL if name in effects[baseline]]
    hardness = {name: draw.normal(0, TYPICAL[name][1], prompts) for name in metrics}
    values: dict[str, dict[str, np.ndarray]] = {}
    systems: dict[str, Any] = {}
    for number, (system, effect) in enumerate(effects.items()):
        values[system] = {}
        for name in metrics:
            mean, spread = TYPICAL[name]
            own = draw.normal(0, spread / 4, prompts)
            values[system][name] = np.maximum(mean + effect.get(name, 0.0) + hardness[name] + own, 0.0)
        systems[system] = _system(system, number, values[system], seeds, curves, draw)
    differences = [
        _difference(other, baseline, name, values[other][name] - values[baseline][name])
        for other in others
        for name in metrics
    ]
    _correct(differences)
    first = metrics[0]
    return {
        "version": 1,
        "title": ", ".join(effects),
        "exam": {
            "name": f"{prompts} held-out prompts of smol",
            "teacher": "embedded:smollm2",
            "prompts": prompts,
            "answer_bytes": 221 * prompts,
            "has_answers": True,
            "has_truths": False,
            "digest": "5f" * 32,
        },
        "decoding": {"temperature": 0.7, "max_tokens": 56, "dreams": 4, "dream_tokens": 66, "seed": 0},
        "baseline": baseline,
        "metrics": metrics,
        "systems": systems,
        "differences": differences,
        "tests": {
            "count": sum(difference["p"] is not None for difference in differences),
            "correction": "Holm",
            "method": "Paired sign-flip permutation test over prompts.",
            "permutations": 10_000,
            "bootstrap": 2_000,
        },
        "disagreements": _disagreements(values, first, prompts),
        "judge": None,
        "warnings": [],
        "versions": {"python": "3.11.2", "torch": "2.8.0"},
        "machine": {"processor": "a processor", "threads": 2, "device": "cpu"},
        "finished": "2026-01-02T03:04:05Z",
    }


def _system(
    name: str, number: int, values: dict[str, np.ndarray], seeds: int, curves: bool, draw: np.random.Generator
) -> dict[str, Any]:
    slug = name.replace(":", "-")
    metrics: dict[str, Any] = {}
    for metric, of_prompts in values.items():
        mean, wide = float(of_prompts.mean()), 1.96 * float(of_prompts.std()) / math.sqrt(len(of_prompts))
        around = [mean + float(x) for x in draw.normal(0, wide / 6, seeds)]
        metrics[metric] = {
            "value": mean,
            "low": mean - wide,
            "high": mean + wide,
            "prompts": len(of_prompts),
            "seeds": around if seeds > 1 else [mean],
        }
    speed = 210.0 / (1 + number)
    return {
        "targets": [f"runs/{slug}-{seed}" for seed in range(seeds)],
        "kind": "run",
        "seeds": seeds,
        "card": {
            "kind": "run",
            "name": name,
            "parameters": 4_200_000 * (1 + number),
            "bytes": 16_800_000 * (1 + number),
            "context": 256,
            "quantization": "float32",
            "dreams": name != "nodream",
        },
        "left_out": 0,
        "metrics": metrics,
        "missing": {},
        "cost": {
            "tokens_per_second": {"median": speed, "low": 0.93 * speed, "high": 1.04 * speed},
            "first_token_seconds": {
                "median": 0.011 * (1 + number),
                "low": 0.010 * (1 + number),
                "high": 0.014 * (1 + number),
            },
            "peak_bytes": 310_000_000 + 60_000_000 * number,
            "prompts": 8,
            "note": "",
        },
        "trained_on": {
            "teacher": "embedded:smollm2",
            "answers": 420,
            "answer_tokens": 23_500,
            "tokens": 983_040,
            "steps": 120,
            "epochs": 6.5,
            "seconds": 310.0 + 20 * number,
            "numerics": "float32 on cpu",
            "parameters": 4_200_000 * (1 + number),
            "settings": {"train.dreams": True, "train.soft_weight": 0.9},
            "data": "ab" * 32,
        },
        "contamination": {
            "checked": True,
            "reason": "",
            "exact": 0,
            "near": 0,
            "contained": 0,
            "prompts": len(next(iter(values.values()))),
            "examples": [],
        },
        "curves": [_curve(f"runs/{slug}-{seed}", number, draw) for seed in range(seeds)] if curves else [],
    }


def _curve(target: str, number: int, draw: np.random.Generator) -> dict[str, Any]:
    points: list[dict[str, Any]] = []
    for step in range(0, 121, 4):
        loss = 2.6 + 0.15 * number + 6.2 * math.exp(-step / 32) + float(draw.normal(0, 0.05))
        points.append(
            {
                "step": step,
                "tokens": 8192 * step,
                "loss": loss,
                "validation_loss": loss + 0.1 if step % 20 == 0 else None,
                "validation_bits_per_byte": 0.7 * loss if step % 20 == 0 else None,
            }
        )
    return {"target": target, "points": points}


def _difference(system: str, against: str, metric: str, of_prompts: np.ndarray) -> dict[str, Any]:
    better = metric_of(metric).better
    mean = float(of_prompts.mean())
    error = float(of_prompts.std()) / math.sqrt(len(of_prompts))
    wins = int((better * of_prompts > 0.002).sum())
    losses = int((better * of_prompts < -0.002).sum())
    return {
        "system": system,
        "against": against,
        "metric": metric,
        "value": mean,
        "low": mean - 1.96 * error,
        "high": mean + 1.96 * error,
        "p": math.erfc(abs(mean) / error / math.sqrt(2)) if better else None,
        "p_corrected": None,
        "prompts": len(of_prompts),
        "wins": wins,
        "ties": len(of_prompts) - wins - losses,
        "losses": losses,
    }


def _correct(differences: list[dict[str, Any]]) -> None:
    """Holm 1979."""
    tested = sorted((d for d in differences if d["p"] is not None), key=lambda d: d["p"])
    least = 0.0
    for i, difference in enumerate(tested):
        least = max(least, min(1.0, (len(tested) - i) * difference["p"]))
        difference["p_corrected"] = least


def _disagreements(values: dict[str, dict[str, np.ndarray]], metric: str, prompts: int) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = []
    for i in range(prompts):
        found = {system: float(each[metric][i]) for system, each in values.items()}
        shown.append(
            {
                "key": f"{i:064x}",
                "prompt": QUESTIONS[i] if i < len(QUESTIONS) else f"Question {i}: what is {i} squared?",
                "teacher": f"The teacher says that {i} times {i} is {i * i}.",
                "metric": metric,
                "spread": max(found.values()) - min(found.values()),
                "values": found,
                "systems": {
                    system: {
                        "dream": "" if system == "nodream" else DREAM,
                        "answer": f"I, {system}, say {i * i + n}. It falls, and it breaks on the stone floor.",
                    }
                    for n, system in enumerate(values)
                },
            }
        )
    return sorted(shown, key=lambda each: -each["spread"])[: min(prompts, 24)]


def _judge(systems: list[str]) -> dict[str, Any]:
    baseline, *others = systems
    pairs: list[dict[str, Any]] = []
    for i, system in enumerate(others):
        wins, ties = 40 + 25 * i, 30
        losses = 190 - wins - ties
        pairs.append(
            {
                "system": system,
                "against": baseline,
                "wins": wins,
                "ties": ties,
                "losses": losses,
                "nonsense": 10,
                "disagreed": 20,
                "identical": 0,
                "agreement": 0.71,
                "agreement_low": 0.64,
                "agreement_high": 0.77,
                "win_rate": (wins + ties / 2) / 190,
                "low": (wins + ties / 2) / 190 - 0.06,
                "high": (wins + ties / 2) / 190 + 0.06,
                "p": 0.0004 * (1 + 40 * i),
                "p_corrected": 0.0016 * (1 + 40 * i),
                "prompts": 190,
            }
        )
    example = {
        "system": others[0],
        "against": baseline,
        "key": "0" * 64,
        "prompt": HOSTILE,
        "answers": {others[0]: HOSTILE, baseline: ""},
        "outcome": "disagreed",
        "verdicts": [
            {"A": others[0], "verdict": "A", "reason": HOSTILE},
            {"A": baseline, "verdict": None, "reason": ""},
        ],
    }
    return {"model": "ollama:llama3.2:1b", "pairs": pairs, "examples": [example]}


def bare() -> dict[str, Any]:
    """Results in which nothing is known but the systems' names."""
    results = small() | {"differences": [], "disagreements": []}
    for system in results["systems"].values():
        system |= {"trained_on": None, "cost": None, "contamination": None, "curves": [], "metrics": {}}
        system["card"] |= dict.fromkeys(("parameters", "bytes", "context"))
    return results
