"""Find the packages and describe the native modules; the rest of the packaging is in setup.cfg.

``dmrpc_cxl._native`` is dmrpc_cxl/_native.pyx and every C file of dmrpc_cxl/csrc, linked into one
module; ``dmrpc_net._native`` likewise. A change in any of a module's sources, headers included,
rebuilds it.
"""

from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, find_packages, setup


def native(package: str) -> Extension:
    """Describe the native module of a package."""
    included = [
        path
        for kind in ("*.pyx", "*.pxd", "*.pxi", "csrc/*.h")
        for path in glob(f"{package}/{kind}")
    ]
    return Extension(
        f"{package}._native",
        sources=[f"{package}/_native.pyx", *sorted(glob(f"{package}/csrc/*.c"))],
        include_dirs=[package, f"{package}/csrc"],
        depends=["setup.py", *sorted(included)],
        extra_compile_args=[
            "-std=gnu11",
            "-O2",
            "-Wall",
            "-Wextra",
            "-fvisibility=hidden",
            "-pthread",
        ],
        extra_link_args=["-pthread"],
    )


setup(
    packages=[
        *find_packages(include=["dmrpc_cxl*", "dmrpc_net*", "pyuserfaultfd*"]),
        *(f"dmrpc_cxl.{name}" for name in find_packages(include=["coordinator*", "fabric*"])),
    ],
    ext_modules=cythonize(
        [native("dmrpc_cxl"), native("dmrpc_net")],
        build_dir="build/cython",
        compiler_directives={"language_level": 3},
    ),
)
