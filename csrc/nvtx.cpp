// Ranges of the NVTX domain `xspec`. The headers come with the CUDA toolkit and load nothing unless
// a tool is attached; without them nothing is ever attached.
#include "api.h"

#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>

namespace xspec {
namespace {

nvtxDomainHandle_t domain() {
  static const nvtxDomainHandle_t handle = nvtxDomainCreateA("xspec");
  return handle;
}

}  // namespace

bool nvtx_attached() { return domain() != nullptr; }

void nvtx_push(const char* name, uint32_t color, const int64_t* payload) {
  nvtxEventAttributes_t range{};
  range.version = NVTX_VERSION;
  range.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
  range.messageType = NVTX_MESSAGE_TYPE_ASCII;
  range.message.ascii = name;
  range.colorType = NVTX_COLOR_ARGB;
  range.color = color;
  if (payload) {
    range.payloadType = NVTX_PAYLOAD_TYPE_INT64;
    range.payload.llValue = *payload;
  }
  nvtxDomainRangePushEx(domain(), &range);
}

void nvtx_pop() { nvtxDomainRangePop(domain()); }

}  // namespace xspec
#else
namespace xspec {

bool nvtx_attached() { return false; }
void nvtx_push(const char*, uint32_t, const int64_t*) {}
void nvtx_pop() {}

}  // namespace xspec
#endif
