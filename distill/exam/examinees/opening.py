"""From a target to the one who sits the exam. What only some of them need is imported for these alone."""

from distill.exam.examinees.protocol import Examinee
from distill.exam.targets import How, Target


def open_examinee(target: Target, how: How) -> Examinee:
    """Load it. Raises CorruptFile and RunMismatch for broken folders, TeacherError where a server refuses."""
    if target.kind == "ollama":
        from distill.exam.examinees.ollama import OllamaExaminee

        return OllamaExaminee(target, how)
    if target.kind == "gguf":
        from distill.exam.examinees.llama_cpp import GgufExaminee

        return GgufExaminee(target, how)
    if target.kind == "transformers":
        from distill.exam.examinees.hf import TransformersExaminee

        return TransformersExaminee(target, how)
    from distill.exam.examinees.native import NativeExaminee

    return NativeExaminee(target, how)


def limits_of(target: Target, how: How) -> list[int]:
    """All that bounds what it writes before its answers. Raises TeacherError where a server doesn't tell."""
    if target.kind == "ollama":
        from distill.exam.examinees.ollama import thinks_in_words

        if thinks_in_words(target, how.timeout):
            return [how.dream_tokens, how.thinking_tokens]
    return [how.dream_tokens]
