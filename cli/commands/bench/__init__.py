"""`dream bench`: its subcommands by what they measure. What is heavy is imported by the one that is called."""

from cli.commands.bench import parts, students
from cli.commands.bench.group import bench

__all__ = ["bench", "parts", "students"]
