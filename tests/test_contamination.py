"""Contamination against comparing every held-out prompt with every training text, on real stores and real bundles."""

import json
import shutil
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_student import small_model, small_tokenizer, write_checkpoint

from bundle.export import describe_run, write_bundle
from bundle.load import load_checkpoint
from distill.config import ExportSettings, Settings, StudentSettings
from distill.corpus.traces import Trace, TraceStore
from distill.events import Event
from distill.exam import contamination
from distill.exam.contamination import HASHES, Contamination, check, hashes_json, of_target, prompt_hash
from distill.exam.questions import Exam, Question, exam_of_prompts, load_exam
from distill.exam.targets import Target, find_target
from distill.run import Run
from distill.teacher.protocol import GenerateOptions, Response, TeacherInfo
from distill.tokens.shown import save_shown
from distill.training.checkpoint import write_checksums


def exam_of(prompts: list[str]) -> Exam:
    return Exam("prompts", Path("nowhere"), [Question(f"{i:04}", prompt) for i, prompt in enumerate(prompts)])


def slow_words(text: str) -> list[str]:
    text = unicodedata.normalize("NFKC", text).casefold()
    found = list[str]()
    for i, char in enumerate(text):
        char = {"−": "-", "×": "*", "÷": "/"}.get(char, char)
        joins = 0 < i < len(text) - 1 and text[i - 1].isalpha() and text[i + 1].isalpha()
        if char.isalnum():
            goes_on = i > 0 and text[i - 1].isalnum()
            found = [*found[:-1], found[-1] + char] if goes_on else [*found, char]
        elif char in "+*<>=%#^≠≤≥" or (char in "-/" and not joins):
            found.append(char)
    return found if any(word.isalnum() for word in found) else [text.strip()]


def slow_shingles(text: str) -> set[str]:
    padded = ["<", *slow_words(text), ">"]
    return {"|".join(padded[i : i + 3]) for i in range(len(padded) - 2)}


def slow_kind(prompt: str, training: list[str]) -> tuple[str, float] | None:
    """Every pair, one after the other."""
    own, line = slow_shingles(prompt), " ".join(slow_words(prompt))
    if any(" ".join(slow_words(other)) == line for other in training):
        return "exact", 1.0
    best = max((len(own & slow_shingles(other)) / len(own | slow_shingles(other)) for other in training), default=0)
    return ("near", best) if best >= 0.7 else None


def assert_as_slow(found: Contamination, prompts: list[str], training: list[str]) -> None:
    want = [slow_kind(prompt, training) for prompt in prompts]
    kinds = Counter(kind[0] for kind in want if kind)
    assert found.checked
    assert (found.exact, found.near) == (kinds["exact"], kinds["near"])
    assert len(found.examples) == min(kinds.total(), contamination.EXAMPLES)
    for example in found.examples:
        kind = slow_kind(example["prompt"], training)
        assert kind is not None
        assert (example["kind"], example["similarity"]) == (kind[0], pytest.approx(kind[1], abs=1e-4))


sentences = st.lists(
    st.sampled_from(["a", "b", "Über", "ﬁsh", "x_1", "?", "don't", "+", "-", "a-b", "a-1", "c++", "×"]), max_size=9
).map(" ".join)
copies = st.lists(st.sampled_from("abcdefghijk"), min_size=8, max_size=14)


@settings(max_examples=80, deadline=None)
@given(st.lists(sentences, min_size=1, max_size=6), st.lists(sentences, max_size=6))
def test_search_finds_what_comparing_all_pairs_finds(prompts: list[str], training: list[str]) -> None:
    assert_as_slow(check(exam_of(prompts), training), prompts, training)


@settings(max_examples=80, deadline=None)
@given(st.lists(copies, min_size=1, max_size=4), st.data())
def test_search_finds_copies_with_a_word_changed(prompts: list[list[str]], data: st.DataObject) -> None:
    training: list[str] = []
    for prompt in prompts:
        place, word = data.draw(st.integers(0, len(prompt) - 1)), data.draw(st.sampled_from(["", "a", "new", "k l"]))
        training.append(" ".join([*prompt[:place], word, *prompt[place + 1 :]]))
    texts = [" ".join(prompt) for prompt in prompts]
    assert_as_slow(check(exam_of(texts), training), texts, training)


TRAINING = [
    "What happens when you drop a ball?",
    "Please tell me in a few words why the sky is blue and what makes it turn red in the evening",
    "What is rust?",
    "写一首关于雪的短诗。",
    "🎈?!",
]


def test_known_cases() -> None:
    prompts = [
        "what happens, when you  DROP a ball",  # exact: other case, marks and spaces
        "Please tell me in a few words why the sky is blue and what makes it turn red in the morning",  # near
        "Why the sky is blue?",  # a part of one
        "What is ice?",
        "写一首关于雪的短诗",  # exact
        "🎈?!",  # exact, though it has no words
        "🌍?!",
    ]
    for one, other in (
        ("What is 12 + 7?", "What is 12 - 7?"),
        ("What is C?", "What is C++?"),
        ("Is 3 × 4", "Is 3 ÷ 4"),
    ):
        assert check(exam_of([one]), [other]).exact == 0
        assert check(exam_of([one]), [one.upper()]).exact == 1
    assert check(exam_of(["A well-known and/or 3−1"]), ["a well known, and or 3 - 1!"]).exact == 1
    found = check(exam_of(prompts), TRAINING)
    assert_as_slow(found, prompts, TRAINING)
    assert (found.exact, found.near, found.prompts) == (3, 1, 7)
    kinds = [example["kind"] for example in found.examples]
    assert kinds == ["exact"] * 3 + ["near"]
    assert found.examples[0]["found"] == TRAINING[0]
    assert found.examples[3]["found"] == TRAINING[1]


def test_the_most_similar_training_prompt_is_shown() -> None:
    prompt = "one two three four five six seven eight nine ten eleven twelve"
    changed = [prompt.replace("twelve", "12 13"), prompt + " thirteen", prompt.replace("one", "1")]
    found = check(exam_of([prompt]), changed)
    assert found.examples[0]["found"] == max(changed, key=lambda text: slow_kind(prompt, [text]) or ("", 0))
    assert found.examples[0]["similarity"] == pytest.approx(11 / 14, abs=1e-4)


def test_nothing_is_found_where_there_is_nothing() -> None:
    assert check(exam_of(["What is ice?"]), []) == Contamination(True, prompts=1)


def test_what_all_questions_have_in_common_is_not_looked_at() -> None:
    texts = [f"what happens when you drop the {thing} on {thing}" for thing in ("ball", "cup", "egg", "pen")]
    search = contamination._Search(texts)
    for text in texts:
        assert search._ranks.keys() >= contamination.shingles(slow_words(text))
    looked = {shingle for shingle, rank in search._ranks.items() if rank in search._holding}
    assert not looked & contamination.shingles(["what", "happens", "when"]), "rarer ones would do"
    search.read("what happens when you drop the ball on ball again")
    assert [found and found.kind for found in search.found] == ["near", None, None, None]


# What a target was trained on.

INFO = TeacherInfo("stub:x", "x", "d" * 64, "t" * 64, "1", True)


def make_run(folder: Path, traces: list[tuple[str, str, bool]], start: str = "") -> Run:
    """A run whose store holds (prompt, answer, held out)."""
    run = Run.create(folder, Settings(student=StudentSettings(init=start)))
    with TraceStore(run.traces) as store:
        store.put_teacher(INFO, None)
        for prompt, answer, held_out in traces:
            key = TraceStore.key(INFO, prompt, GenerateOptions())
            response = Response(answer, None, "stop", {})
            store.put(Trace(key, prompt, held_out, response, GenerateOptions(), INFO.digest))
    return run


def test_each_target_is_checked_against_its_own_run(tmp_path: Path) -> None:
    """The exam is one run's; the other run was trained on some of its prompts."""
    asked = "Why do leaves fall in autumn?"
    own = make_run(tmp_path / "own", [(asked, "They age.", True), ("What is a leaf?", "Green.", False)])
    other = make_run(tmp_path / "other", [(asked.upper(), "Cold.", False), ("What is snow?", "Cold.", True)])
    started = make_run(tmp_path / "started", [("What is a leaf?", "Green.", False)], start="somewhere/big-model")
    exam = Exam("own", tmp_path, [Question("k", asked)], run=own)
    of_own, of_other, of_started = (
        of_target(Target(run.name, "run", run.checkpoints / "step-000001", run=run), exam)
        for run in (own, other, started)
    )
    assert (of_own.checked, of_own.examples, of_own.reason) == (True, [], "")
    assert (of_other.checked, of_other.exact) == (True, 1)
    assert of_other.examples == [{"prompt": asked, "found": asked.upper(), "similarity": 1.0, "kind": "exact"}]
    assert (of_started.checked, of_started.examples) == (True, [])
    assert "big-model" in of_started.reason
    loop = own.checkpoints / "step-000001" / "loop.json"
    loop.parent.mkdir(parents=True, exist_ok=True)
    loop.write_text(json.dumps({"step": 1, "settings": {"facts": {"how": {}}}}), encoding="utf-8")
    learned = of_target(Target("own", "run", loop.parent, run=own), exam)
    assert learned.checked
    assert "what it learned after its training" in learned.reason
    for how, told in (({}, False), ({"texts": "a digest"}, True)):
        loop.write_text(json.dumps({"step": 1, "settings": {"polish": {"how": how}}}), encoding="utf-8")
        polished = of_target(Target("own", "run", loop.parent, run=own), exam)
        assert ("dream polish --prompts" in polished.reason) == told
    checkpoint = Target("c", "checkpoint", other.checkpoints / "step-000001", run=other)
    other.record("capture", {}, {"traces.db": "before"}, {}, 0.0)
    other.record("train", {}, {}, {}, 0.0)
    assert of_target(checkpoint, exam).exact == 1
    other.record("capture", {}, {"traces.db": "held out otherwise"}, {}, 0.0)
    since = of_target(checkpoint, exam)
    assert (since.checked, since.prompts) == (False, 1)
    assert "made anew since its training" in since.reason
    other.record("capture", {}, {"traces.db": "before"}, {}, 0.0)
    other.bundle.mkdir()
    (other.bundle / "model.gguf").write_bytes(b"GGUF")
    inside = find_target(str(other.bundle / "model.gguf"))
    assert inside.name == "other/model.gguf"
    assert of_target(inside, exam).exact == 1
    other.traces.unlink()
    gone = of_target(checkpoint, exam)
    assert (gone.checked, gone.prompts) == (False, 1)
    assert str(other.traces) in gone.reason


def test_targets_of_the_same_training_set_are_searched_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = "What is a leaf?"
    run = make_run(tmp_path / "run", [(asked, "Green.", False), ("What is snow?", "Cold.", False)])
    monkeypatch.setattr(contamination, "TOLD", 1)
    events, searched = list[Event](), dict[str, Contamination]()

    def found() -> Contamination:
        return of_target(Target("c", "checkpoint", run.checkpoints, run=run), exam, events.append, searched)

    exam = exam_of([asked])
    assert found().exact == found().exact == 1
    assert [(event.kind, event.done, event.unit) for event in events] == [
        ("progress", 1, "training prompts"),
        ("progress", 2, "training prompts"),
    ]
    exam = exam_of(["What is rain?"])
    assert found().exact == 0, "other questions"
    run.traces.unlink()
    make_run(run.path, [("What is rain?", "Wet.", False)])
    assert found().exact == 1, "captured anew"


def test_a_start_is_known_by_the_checkpoint(tmp_path: Path) -> None:
    """Though the run's settings or its mining are others by now."""
    run = make_run(tmp_path / "run", [("What is a leaf?", "Green.", False)], start="chance")
    folder = run.checkpoints / "step-000001"
    folder.mkdir(parents=True)
    fixed = {"start": "5" * 64, "student": {"init": "teacher"}}
    (folder / "loop.json").write_text(json.dumps({"step": 1, "settings": fixed}), encoding="utf-8")
    found = of_target(Target("run", "run", folder, run=run), exam_of(["What is snow?"]))
    assert found.reason == "what its teacher, its start, was trained on is not known"


def test_questions_about_pictures_are_compared_as_they_are_shown(tmp_path: Path) -> None:
    picture = "./pictures/0a1b.png"
    asked, learned = f"What is in this picture? {picture}", f"what is in this picture {picture}"
    run = make_run(tmp_path / "run", [(asked, "A dog.", True), (learned, "A dog.", False)])
    run.record("capture", {}, {}, {}, 0.0)
    save_shown(run.tokenizer, {picture: "⟨dog⟩ left ⟨cup⟩ right"})
    found = of_target(Target("run", "run", run.checkpoints, run=run), load_exam(run))
    assert (found.exact, found.prompts) == (1, 1)


def test_what_nobody_can_know_is_not_checked(tmp_path: Path) -> None:
    exam = exam_of(["What is snow?"])
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    old = tmp_path / "bundle-of-old"
    old.mkdir()
    (old / "bundle.json").write_text("{}", encoding="utf-8")
    reasons: list[str] = []
    for spec in ("ollama:llama3.2:1b", str(gguf), str(folder), str(old)):
        found = of_target(find_target(spec), exam)
        assert found == Contamination(False, found.reason, prompts=1)
        reasons.append(found.reason)
    assert all(reasons)
    assert len(set(reasons)) == 2
    assert "export it again" in reasons[-1]


def test_a_bundle_elsewhere_knows_its_training_prompts(smollm2: Path, tmp_path: Path) -> None:
    training = ["What happens when you drop a ball?", "How do plants grow in the garden?"]
    run = make_run(tmp_path / "run", [(prompt, "Well.", False) for prompt in training] + [("Held out?", "Yes.", True)])
    tokenizer = small_tokenizer(smollm2)
    checkpoint = write_checkpoint(run.checkpoints / "step-000001", small_model(tokenizer), tokenizer)
    student = load_checkpoint(checkpoint, "tiny", "")
    elsewhere = tmp_path / "elsewhere"
    write_bundle(elsewhere, student, ExportSettings(), describe_run(run, checkpoint))
    kept = (elsewhere / HASHES).read_text(encoding="utf-8")
    assert not any(word in kept.lower() for word in ("ball", "plants", "held"))
    assert json.loads(kept)["prompts"] == sorted(prompt_hash(prompt) for prompt in training)
    save_shown(run.tokenizer, {"./pictures/1.png": "⟨dog⟩ left"})
    pictured = make_run(run.path, [("What? ./pictures/1.png", "A dog.", False)])
    hashes = json.loads(describe_run(pictured, checkpoint).training_prompts)["prompts"]
    assert prompt_hash("What? ⟨dog⟩ left") in hashes
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "Held out?\nwhat happens when you drop a ball\nWhat happens when you drop a cup?\n", encoding="utf-8"
    )
    exam = exam_of_prompts(str(prompts), tmp_path)
    for spec in (elsewhere, elsewhere / "model.gguf"):
        found = of_target(find_target(str(spec)), exam)
        assert (found.checked, found.exact, found.near, found.prompts) == (True, 1, 0, 3)
        assert [example["prompt"] for example in found.examples] == ["what happens when you drop a ball"]
        assert "exact copies only" in found.reason
    shutil.copytree(elsewhere, run.bundle)
    for spec in (run.bundle, run.bundle / "model.gguf"):
        write_checksums(checkpoint)
        assert of_target(find_target(str(spec)), exam).reason == "", (
            "its run tells more, if it is of the checkpoint still"
        )
        (checkpoint / "checksums.json").write_text('{"model.safetensors": "of other weights"}', encoding="utf-8")
        assert "exact copies only" in of_target(find_target(str(spec)), exam).reason
    for broken in ('{"version":1,"prompts":[]}', "[]"):
        (elsewhere / HASHES).write_text(broken, encoding="utf-8")
        unread = of_target(find_target(str(elsewhere)), exam)
        assert (unread.checked, unread.prompts) == (False, 3)
        assert "export the bundle again" in unread.reason


def test_hashes_are_of_words() -> None:
    assert prompt_hash("What is ICE?") == prompt_hash("what  is ice")
    assert prompt_hash("ﬁsh") == prompt_hash("fish")
    assert prompt_hash("What is ice?") != prompt_hash("Is what ice?")
    assert len(json.loads(hashes_json(["a", "A!", "b"]))["prompts"]) == 2
