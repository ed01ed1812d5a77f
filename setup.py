"""The one C extension; everything else is declared in pyproject.toml."""

from setuptools import Extension, setup

_NAMES = ("_guard", "_map", "_shoot", "_fault", "_commit", "_words", "_region", "_engine", "_entries", "_module", "_device", "_device_type",
          "_cache", "_evict", "_absent", "_cache_type")

setup(
    ext_modules=[
        Extension(
            "onecopy.daxemu._fault",
            [f"src/onecopy/daxemu/{name}.c" for name in _NAMES],
            depends=[f"src/onecopy/daxemu/{name}.h" for name in ("_fault", "_module", "_device", "_device_type", "_cache")],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            extra_compile_args=["-std=c11", "-O2", "-ftls-model=initial-exec", "-Wall", "-Wextra", "-Werror"],
            py_limited_api=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
