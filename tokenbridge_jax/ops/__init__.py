"""Operations with a fast version for some devices and a plain one for all others."""
