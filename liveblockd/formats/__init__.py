"""Image formats: drivers that find their bytes in a ``file`` child."""
