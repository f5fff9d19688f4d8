"""SE(3)-Transformers: attention networks on 3D graphs whose outputs rotate with their inputs."""
