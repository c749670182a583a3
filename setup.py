"""Packages and package data; the metadata lies in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["megatron_md*"]),
    package_data={
        "megatron_md": [
            "presets/*.yaml",
            "parity/reference.json",
            "evaluate/trace.html",
            "report/page.html",
            "simulate/guard.cpp",
            "simulate/devices/*.yaml",
            "py.typed",
        ]
    },
)
