// What every file of the shim shares: the thread's last error message and the macro that turns C++ exceptions into a status.
#pragma once

#include <c10/util/Exception.h>

#include <cstdint>
#include <exception>

namespace flowhn {
void set_last_error(const char* message);
}

// Runs the statements and returns 0; any exception becomes status 1 and the thread's last error. Nothing is thrown across the C border.
#define FLOWHN_TRY(...)                                      \
  try {                                                      \
    __VA_ARGS__;                                             \
    return 0;                                                \
  } catch (const c10::Error& error) {                        \
    flowhn::set_last_error(error.what_without_backtrace());  \
  } catch (const std::exception& error) {                    \
    flowhn::set_last_error(error.what());                    \
  } catch (...) {                                            \
    flowhn::set_last_error("a C++ exception of unknown type"); \
  }                                                          \
  return 1
