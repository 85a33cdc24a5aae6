"""Operations with a plain version, which defines them, and fast ones for GPUs and TPUs."""
