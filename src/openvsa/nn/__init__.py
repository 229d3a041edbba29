"""Layout, selector and op put together: the VSA op and the module around it."""

from openvsa.nn.attention import VideoSparseAttention
from openvsa.nn.functional import compressed_attention, video_sparse_attention

__all__ = ["VideoSparseAttention", "compressed_attention", "video_sparse_attention"]
