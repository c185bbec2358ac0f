"""Geometries: a norm, its dual norm and its linear minimisation oracle, in one small class each.

`Geometry` measures a list of parameters, `LayerGeometry` the tensor of one layer; `Product` makes a `Geometry` of one
`LayerGeometry` per layer.
"""

from smoothdiag.geometry.layer import RMS, Column, Frobenius, LayerGeometry, Row, Sign, describe
from smoothdiag.geometry.parts import Part, Parts
from smoothdiag.geometry.product import ByShape, Product
from smoothdiag.geometry.spectral import Convolution, Spectral, newton_schulz
from smoothdiag.geometry.vector import Diagonal, Euclidean, Geometry, check_geometry

__all__ = [
    "RMS",
    "ByShape",
    "Column",
    "Convolution",
    "Diagonal",
    "Euclidean",
    "Frobenius",
    "Geometry",
    "LayerGeometry",
    "Part",
    "Parts",
    "Product",
    "Row",
    "Sign",
    "Spectral",
    "check_geometry",
    "describe",
    "newton_schulz",
]
