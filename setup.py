"""Builds what is not Python: attention over a cache on CPU, where there is a C++ compiler; all else is in setup.cfg."""

import pathlib

import jaxlib
from setuptools import Extension, setup

_FOLDER = "pallas_kernels/decode_attention/native"

setup(
    ext_modules=[
        Extension(
            "pallas_kernels.decode_attention._native_cpu",
            [f"{_FOLDER}/decode_attention.cc"],
            depends=[f"{_FOLDER}/attend.inc"],
            include_dirs=[str(pathlib.Path(jaxlib.__file__).parent / "include")],  # of XLA's interface for such calls
            extra_compile_args=["-std=c++17", "-O3", "-fopenmp-simd", "-Wno-psabi", "-w"],
            language="c++",
            optional=True,  # without a compiler, XLA computes the same
        )
    ]
)
