// Host code includes this header but needs nothing of it.
#pragma once
